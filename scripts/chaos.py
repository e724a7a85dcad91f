#!/usr/bin/env python
"""A served run whose processes are killed at random moments must end with the artifacts of one that nobody disturbed.

    python scripts/chaos.py [--kills 100] [--rounds 6] [--seed 0] [--every 4] [--calm DIR] [--out runs/chaos]

Two runs of `selfplay serve` on the miniature of the tiny world, in its smallest sizes. In the second, SIGKILL goes to the
service itself or to a random process below it (engine, reward server, judge, trainer, importer, their guards), at
exponentially distributed times, but never twice before the run got on; a dead service is started again. Then prompts,
candidates, pairs, verdicts, weights and β of every round are compared, to the byte. Exit code 0: everything is the same, no
row is missing or double, no process and no lock is left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from selfplay.processes.reaping import marked  # noqa: E402
from selfplay.storage import paging, tables  # noqa: E402
from selfplay.storage.ledger import Store  # noqa: E402
from selfplay.storage.lock import RunLock  # noqa: E402

SETTINGS = [
    "prompts.per_round=32", "generate.candidates=4", "generate.shard_prompts=8", "generate.engine.restarts=50",
    "generate.engine.cpu_kv_cache_gib=0.125", "pairs.keep=1.0", "train.batch_pairs=8", "train.micro_batch_pairs=8", "train.save_steps=1",
    "evaluate.prompts=24", "evaluate.audit_prompts=16", "evaluate.gate.win_rate_lower=0", "evaluate.gate.reward_up=false",
    "evaluate.gate.max_length_ratio=9", "evaluate.gate.max_cut_off=1", "retention.last=1000", "service.port=0",
    "service.retries=1000", "service.retry_seconds=0.1", "track=none",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills before the run may end (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims")
    parser.add_argument("--every", type=float, help="mean seconds between kills (default: a twentieth of the calm run)")
    parser.add_argument("--share", type=float, default=0.3, help="share of the kills that hit the service itself")
    parser.add_argument(
        "--calm", type=Path, help="a finished run of these settings to compare with, instead of a new one"
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    args = parser.parse_args()
    sets = [*world(), *SETTINGS, f"schedule.end.rounds={args.rounds}", *args.set]
    if args.calm is None:
        args.calm = args.out / "calm"
        shutil.rmtree(args.calm, ignore_errors=True)
        calm = Served(args.config, sets, args.calm)
        calm.until_ended()
        calm.stop()
    seconds = lasted(args.calm)
    print(f"calm: {args.rounds} rounds in {seconds:.0f} s", flush=True)
    args.every = args.every or seconds / 20
    shutil.rmtree(args.out / "storm", ignore_errors=True)
    began = time.monotonic()
    hits, orphans = storm(args, sets)
    took = time.monotonic() - began
    print(
        f"storm: {sum(hits.values())} kills in {took:.0f} s: "
        + ", ".join(f"{n} × {what}" for what, n in hits.most_common())
    )
    faults = compare(args.calm, args.out / "storm")
    if wrong := report_rows(args.calm, args.out / "storm"):
        faults.append(f"{wrong} rows are missing or double")
    faults += [f"{orphans} processes outlived a killed service"] * bool(orphans)
    if (kills := sum(hits.values())) < args.kills:
        faults.append(f"{kills} kills, {args.kills} were asked: give it more --rounds")
    for fault in faults:
        print(f"FAULT: {fault}")
    files = len(artifacts_of(args.calm))
    print(f"{files} artifacts compared, {len(faults)} faults, {orphans} orphans")
    return int(bool(faults))


def world() -> list[str]:
    """Settings that name the miniature, which is built where it is not there."""
    out = ROOT / ".cache" / "tiny-mini"
    make = [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--size", "mini", "--out", str(out)]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    here = (out / "current").resolve()
    return [
        f"policy.model={here / 'policy'}", f"reward.model={here / 'reward'}", f"prompts.source={here / 'train.jsonl'}",
        f"prompts.heldout={here / 'heldout.jsonl'}", f"evaluate.judge.model={here / 'judge'}",
    ]  # fmt: skip


class Served:
    """`selfplay serve` on a folder, started again when it is gone."""

    def __init__(self, config: str, sets: list[str], run_dir: Path) -> None:
        self.run_dir, self.log = run_dir, run_dir / "service.log"
        words = [word for each in sets for word in ("--set", each)]
        self._argv = [
            sys.executable,
            "-m",
            "selfplay.cli",
            "serve",
            "--config",
            config,
            "--run-dir",
            str(run_dir),
            *words,
        ]
        self.start()

    def start(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, stdout=log, stderr=log, cwd=ROOT)

    def state(self) -> Any:
        if not (self.run_dir / "ledger.sqlite").is_file():
            return None
        store = Store(self.run_dir)
        try:
            return (store.state("service") or {}).get("state"), (store.state("pause") or {}).get("why")
        finally:
            store.close()

    def until_ended(self) -> None:
        """Wait for the schedule's end. Ends the program where the service stops or pauses instead."""
        while (state := self.state()) is None or state[0] != "ended":
            if self.process.poll() is not None or (state is not None and state[0] == "paused"):
                sys.exit(f"{self.run_dir}: the service is {state}; see service.log there")
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        if code := self.process.wait(120):
            sys.exit(f"{self.run_dir}: the service ended with exit code {code} on SIGTERM")


def lasted(run_dir: Path) -> float:
    """Seconds from the first event of a run to the end of its last round."""
    store = Store(run_dir)
    first, last = store.events()[0]["time"], store.rounds()[-1]["ended"]
    store.close()
    return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()


def storm(args: argparse.Namespace, sets: list[str]) -> tuple[Counter[str], int]:
    """Kill until there were enough kills and the run has ended; returns what was hit, and how many outlived a service."""
    rng, hits, orphans, said = random.Random(args.seed), Counter[str](), 0, 0
    served = Served(args.config, sets, args.out / "storm")
    while True:
        time.sleep(rng.expovariate(1 / args.every))
        enough = sum(hits.values()) >= args.kills
        state = served.state()
        if state is not None and state[0] == "ended":
            break
        if state is not None and state[0] == "paused":
            sys.exit(f"the service paused itself: {state[1]}")
        if served.process.poll() is not None:  # nobody killed it: starting it again would hide that
            sys.exit(f"the service ended by itself with exit code {served.process.returncode}; see service.log")
        below = marked(served.run_dir)
        if enough or not below or served.log.stat().st_size == said:  # as after the last kill
            continue
        if hits["service"] + 0.5 < args.share * sum(hits.values()):
            hits["service"] += 1
            served.process.kill()
            served.process.wait()
            orphans += outlived(served.run_dir)
            served.start()
        elif victim := kill(rng.choice(sorted(below))):
            hits[victim] += 1
        else:
            continue
        said = served.log.stat().st_size
        if sum(hits.values()) % 10 == 0:
            print(f"  {sum(hits.values())} kills, state {state}", flush=True)
    served.stop()
    return hits, orphans + outlived(served.run_dir)


def outlived(run_dir: Path, within: float = 10.0) -> int:
    """Processes of the run that are still there some seconds after the service was killed."""
    deadline = time.monotonic() + within
    while (left := marked(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return len(left)


def kill(pid: int) -> str | None:
    """SIGKILL a process; returns what it was, None where it had just ended by itself."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        os.kill(pid, signal.SIGKILL)
    except (OSError, ProcessLookupError):
        return None
    modules = [word for word in words if word.startswith(("selfplay.", "reward."))]
    return f"guard of {modules[1]}" if len(modules) > 1 else modules[0] if modules else words[0]


PATTERNS = (
    "pool/**/*.arrow",
    "pool/**/*.parquet",
    "rounds/*/*/*.parquet",
    "rounds/*/*/verdict.json",
    "policies/*/*.safetensors",
)


def artifacts_of(run_dir: Path) -> dict[str, bytes]:
    """What two equal runs share to the byte."""
    return {str(f.relative_to(run_dir)): f.read_bytes() for pattern in PATTERNS for f in sorted(run_dir.glob(pattern))}


def rows_of(run_dir: Path) -> Counter[str]:
    """Rows in all rounds together of each kind of table: prompts/prompts, generate/candidates, pairs/pairs, …"""
    counts: Counter[str] = Counter()
    for path in sorted(run_dir.glob("pool/**/*.parquet")) + sorted(run_dir.glob("rounds/*/*/*.parquet")):
        parts = path.relative_to(run_dir).with_suffix("").parts
        counts["/".join(parts[2:] if parts[0] == "rounds" else parts[:2])] += tables.count_rows(path)
    store = Store(run_dir)
    counts["ledger/pairs"] = sum(sum(paging.reasons(store, row["round"]).values()) for row in store.rounds())
    store.close()
    return counts


def report_rows(calm: Path, disturbed: Path) -> int:
    """Print the rows of both runs, kind by kind; returns how many are missing or double."""
    a, b = rows_of(calm), rows_of(disturbed)
    lost, double = (a - b).total(), (b - a).total()
    print("\n| rows of | calm | storm |\n|---|---|---|")
    for kind in sorted(a | b):
        print(f"| {kind} | {a[kind]:,} | {b[kind]:,} |")
    print(f"\n{a.total():,} rows compared: {lost} lost rows, {double} double rows")
    return lost + double


def compare(calm: Path, disturbed: Path) -> list[str]:
    """How two runs differ, in words; empty when they do not."""
    a, b = artifacts_of(calm), artifacts_of(disturbed)
    faults = [f"{name} is missing" for name in a.keys() - b.keys()] + [
        f"{name} is too much" for name in b.keys() - a.keys()
    ]
    faults += [f"{name} differs" for name in a.keys() & b.keys() if a[name] != b[name]]
    ledgers = []
    for run_dir in (calm, disturbed):
        store = Store(run_dir)
        rounds = [(r["round"], r["state"], r["sampler"], r["policy"]) for r in store.rounds()]
        stages = [(r["round"], sorted(store.seconds(r["round"]))) for r in store.rounds()]
        betas = [(p["version"], p["beta"], p["reference"], p["state"]) for p in store.policies()]
        ledgers.append((rounds, stages, betas))
        store.close()
    faults += [
        f"the ledgers differ in their {name}"
        for name, x, y in zip(("rounds", "stages", "policies"), *ledgers, strict=True)
        if x != y
    ]
    for leftover in disturbed.rglob("*"):
        if leftover.name.endswith((".partial", ".shards", ".work")):
            faults.append(f"{leftover.relative_to(disturbed)} was left")
    with RunLock(disturbed):  # raises where somebody still holds it
        pass
    return faults


if __name__ == "__main__":
    sys.exit(main())
