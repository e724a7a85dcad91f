#!/usr/bin/env python
"""Does the policy get better? Whole runs with several run seeds (sampling and prompts; one world), judged on the audit set.

    python scripts/bench_learning.py [--seeds 1 2 3 4 5] [--rounds 4] [--out runs/learning]

For each seed a run of its own (an interrupted one goes on), then per round the current policy's mean reward and gold
scores on the audit set, which neither trains nor gates. «noise» of a fall: 1.96 standard errors of the paired difference.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    args = parser.parse_args()
    good = 0
    for seed in args.seeds:
        run_dir = args.out / f"seed-{seed}"
        sets = [f"run.seed={seed}", "evaluate.audit_every=1", *args.set]
        argv = [sys.executable, str(ROOT / "scripts" / "round.py"), "--config", args.config, "--run-dir", str(run_dir)]
        argv += ["--rounds", str(args.rounds), *(word for s in sets for word in ("--set", s))]
        code = subprocess.run(argv, stdout=subprocess.DEVNULL).returncode
        if code:
            sys.exit(f"seed {seed}: round.py ended with exit code {code}; see {run_dir}/logs")
        good += show(seed, run_dir)
    print(f"{good} of {len(args.seeds)} seeds meet every line")


def show(seed: int, run_dir: Path) -> bool:
    """Print one seed's table and whether it meets the lines; rounds whose candidate was rejected repeat the champion."""
    from selfplay.storage import tables
    from selfplay.storage.ledger import Store
    from selfplay.types import Scored

    store = Store(run_dir)
    rows: list[tuple[int, str, float, float, float, float, float]] = []
    answers: list[list[Scored]] = []
    for row in store.rounds():
        m = store.metrics(row["round"])
        if not rows:
            rows.append(
                (
                    0,
                    "initial",
                    m["evaluate/audit_reward_initial"],
                    m["evaluate/audit_gold_total_initial"],
                    m["evaluate/audit_gold_content_initial"],
                    0.5,
                    0.0,
                )
            )
            answers.append(tables.read_rows(run_dir / "rounds" / "0001" / "evaluate" / "audit_initial.parquet", Scored))
        if row["state"] == "promoted":
            rows.append(
                (
                    row["round"],
                    row["state"],
                    m["evaluate/audit_reward"],
                    m["evaluate/audit_gold_total"],
                    m["evaluate/audit_gold_content"],
                    m["evaluate/audit_gold_win_rate"],
                    m["evaluate/length"],
                )
            )
            answers.append(
                tables.read_rows(run_dir / "rounds" / f"{row['round']:04d}" / "evaluate" / "audit.parquet", Scored)
            )
        else:
            rows.append((row["round"], row["state"], *rows[-1][2:]))
            answers.append(answers[-1])
    store.close()
    print(f"seed {seed}:  round  state      reward  gold  content  gold win rate vs initial  length")
    for index, state, reward, total, content, won, length in rows:
        print(f"          {index:5d}  {state:9s} {reward:7.3f} {total:6.3f} {content:7.3f} {won:12.3f} {length:19.1f}")
    three = rows[:4]
    rises = all(b[2] > a[2] for a, b in pairwise(three))
    wins, content = three[-1][5] > 0.65, three[-1][4] > three[0][4]
    fourth = True
    if len(rows) > 4:
        for part in ("total", "content"):
            change, noise = paired(answers[3], answers[4], part)
            fourth &= change >= -noise  # none where the gate kept the policy
            print(f"          4th round, gold {part}: {change:+.4f} (noise {noise:.4f})")
    print(
        f"          reward rises in 3 rounds: {rises}; gold win rate > .65: {wins}; content up: {content}; 4th holds: {fourth}",
        flush=True,
    )
    return rises and wins and content and fourth


def paired(before: list[Any], after: list[Any], part: str) -> tuple[float, float]:
    """Mean difference of a gold part over the same prompts, and 1.96 of its standard errors."""
    other = {a.prompt_id: a.reward_parts[part] for a in after if a.reward_parts}
    differences = [other[b.prompt_id] - b.reward_parts[part] for b in before if b.prompt_id in other]
    return statistics.mean(differences), 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))


if __name__ == "__main__":
    main()
