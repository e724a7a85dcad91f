#!/usr/bin/env python
"""Seeded histories of the service on a virtual clock, with faults and orders at any moment (docs/simulation.md).

    python scripts/simulate.py [--seeds 20000] [--first 0]
    python scripts/simulate.py --seed 123 [--plan "45=kill 60=order-cancel"]

Each seed is a history: what happens, at which moment, and what rounds come to. With `--seed` one history is told step by step; a
`--plan` says what happens in it instead of the seed. Where an invariant does not hold, the shortest plan that still shows it is
printed. Exit code 1: at least one did not hold.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PAGES = "GLIBC_TUNABLES"  # read before a program begins: memory in large pages is quicker
if __name__ == "__main__" and PAGES not in os.environ:
    os.execve(sys.executable, sys.orig_argv, {**os.environ, PAGES: "glibc.malloc.hugetlb=1"})

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from simulation.history import Outcome, Simulation  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20_000, help="how many histories (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="one history, told step by step")
    parser.add_argument("--plan", help="what happens in it: moment=action, separated by spaces")
    parser.add_argument("--most", type=int, default=10, help="broken histories to stop after (default: %(default)s)")
    args = parser.parse_args()
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        Simulation(Path(folder) / "simulation") as simulation,
    ):
        if args.seed is None:
            return many(simulation, range(args.first, args.first + args.seeds), args.most)
        found = simulation.run(args.seed, None if args.plan is None else parsed(args.plan), print)
        print(found)
        return int(found.error is not None)


def many(simulation: Simulation, seeds: range, most: int) -> int:
    gc.disable()  # what a history leaves is freed with its last reference, but for some cycles
    gc.freeze()  # what is there already stays, and is not looked at again
    began, cpu, broken = time.monotonic(), time.process_time(), 0
    happened: Counter[str] = Counter()
    moments = rounds = starts = done = 0
    for seed in seeds:
        if seed % 200 == 0:
            gc.collect()
            gc.freeze()
        found = simulation.run(seed)
        done, moments, rounds, starts = done + 1, moments + found.moments, rounds + found.rounds, starts + found.starts
        happened.update(found.happened.values())
        if found.error is not None:
            broken += 1
            short = shrunk(simulation, found)
            print(f'seed {seed}: {short.error}\n    --seed {seed} --plan "{short.plan}"', flush=True)
            if broken >= most:
                break
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    print(
        f"{done} histories in {seconds:.0f} s, {cpu:.0f} s of CPU ({done / cpu:.0f} a second): {moments} moments, {starts} starts, {rounds} "
        f"rounds in their ledgers; {broken} broken"
    )
    print(", ".join(f"{action} {count}" for action, count in sorted(happened.items())))
    return int(broken > 0)


def shrunk(simulation: Simulation, found: Outcome) -> Outcome:
    """The same history with as little happening as still breaks an invariant."""
    plan = dict(found.happened)
    best = simulation.run(found.seed, plan)
    if best.error is None:
        return found
    for moment in sorted(plan, reverse=True):
        fewer = {other: action for other, action in plan.items() if other != moment}
        tried = simulation.run(found.seed, fewer)
        if tried.error is not None:
            plan, best = fewer, tried
    return best


def parsed(plan: str) -> dict[int, str]:
    return {int(moment): action for moment, _, action in (part.partition("=") for part in plan.split())}


if __name__ == "__main__":
    sys.exit(main())
