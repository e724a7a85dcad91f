#!/usr/bin/env python
"""Does a service that runs for long grow? Many rounds of the smallest size, and what the processes hold after each.

    python scripts/soak.py [--rounds 100] [--out runs/soak]

`selfplay serve` on the miniature of the tiny world. After each round: resident memory, file descriptors, threads and
number of processes of the service itself and of all its children together. Growth compares the median of the last tenth of
the rounds with that of the second tenth (the first warms up). Also: the share of each round's time outside its stages.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from chaos import SETTINGS, Served, world  # noqa: E402

from selfplay import children  # noqa: E402
from selfplay.store import Store  # noqa: E402

SMALLEST = [
    "prompts.per_round=8", "generate.candidates=2", "train.batch_pairs=4", "train.micro_batch_pairs=4", "train.epochs=1",
    "train.save_steps=100", "evaluate.prompts=4", "evaluate.audit_every=0", "retention.last=1",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    sets = [*world(), *SETTINGS, *SMALLEST, f"schedule.end.rounds={args.rounds}", *args.set]
    served = Served(args.config, sets, args.out)
    samples: list[dict[str, float]] = []
    began = time.monotonic()
    while (state := served.state()) is None or state[0] != "ended":
        if served.process.poll() is not None or (state is not None and state[0] == "paused"):
            sys.exit(f"the service is {state}; see {args.out}/service.log")
        time.sleep(0.2)
        if not (args.out / "ledger.sqlite").is_file():
            continue
        store = Store(args.out)
        finished = sum(row["state"] != "running" for row in store.rounds())
        store.close()
        if finished > len(samples):
            samples += [held(served.process.pid, args.out)] * (finished - len(samples))
            if finished % 10 == 0:
                print(
                    f"  round {finished}, {(time.monotonic() - began) / finished:.1f} s a round: " + shown(samples[-1]),
                    flush=True,
                )
    served.stop()
    return report(samples, args.out)


def held(pid: int, run_dir: Path) -> dict[str, float]:
    """What the service and its children hold now."""
    own, below = used([pid]), used(p for p in children.marked(run_dir) if "selfplay.trainer" not in command(p))
    return {f"service {k}": v for k, v in own.items() if k != "processes"} | {
        f"children {k}": v for k, v in below.items()
    }


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def used(pids: Iterable[int]) -> dict[str, float]:
    total = {"MiB": 0.0, "descriptors": 0.0, "threads": 0.0, "processes": 0.0}
    for pid in pids:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            total["descriptors"] += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:  # it ended meanwhile
            continue
        total["MiB"] += int(status["VmRSS"].split()[0]) / 1024
        total["threads"] += int(status["Threads"])
        total["processes"] += 1
    return total


def shown(sample: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in sample.items())


def report(samples: list[dict[str, float]], run_dir: Path) -> int:
    """Print the table; 1 where something grew by more than a twentieth."""
    tenth = max(1, len(samples) // 10)
    print(f"\n{len(samples)} rounds\n\n| | rounds {tenth + 1}-{2 * tenth} | last {tenth} | growth |\n|---|---|---|---|")
    grown = 0
    for name in samples[0]:
        before = statistics.median(s[name] for s in samples[tenth : 2 * tenth] or samples)
        after = statistics.median(s[name] for s in samples[-tenth:])
        growth = after / before - 1 if before else 0.0
        grown |= growth > 0.05
        print(f"| {name} | {before:.1f} | {after:.1f} | {growth:+.1%} |")
    store = Store(run_dir)
    shares = []
    for row in store.rounds():
        whole = (datetime.fromisoformat(row["ended"]) - datetime.fromisoformat(row["started"])).total_seconds()
        shares.append(1 - sum(store.seconds(row["round"]).values()) / whole)
    store.close()
    print(f"\nshare of a round outside its stages: median {statistics.median(shares):.2%}, most {max(shares):.2%}")
    return grown


if __name__ == "__main__":
    sys.exit(main())
