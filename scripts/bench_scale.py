#!/usr/bin/env python
"""What the data plane costs at scale, one line a figure, beside what it cost before and what it has to reach.

    python scripts/bench_scale.py                 # everything but the largest round: about ten minutes on two cores
    python scripts/bench_scale.py --large         # also a round of 64k prompts × 8 (half an hour, some 5 GB of disk)
    python scripts/bench_scale.py --only round    # one of: round, import, draw, pipe, ledger

Each figure is measured by a process of its own, by the scripts in `scripts/scale/`: synthetic artifacts of 591 tokens a
response, real code on both sides of every boundary but the engine, the reward server and the trainer. «before» are the
figures of commit df90fa7. Peaks are resident memory of the controller. Other work on the machine moves wall seconds most,
processor seconds less, and memory not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCALE = Path(__file__).resolve().parent / "scale"
PARTS = ("round", "import", "draw", "pipe", "ledger")
BATCH, LARGE = 8192, 65_536  # prompts of a round

Figure = tuple[str, str, str, str]  # what, before, to reach, now


def run(script: str, *arguments: str) -> dict[str, Any]:
    """The last line of JSON that a script of `scripts/scale/` prints."""
    argv = [sys.executable, str(SCALE / f"{script}.py"), *arguments]
    started = time.monotonic()
    print(f"… {' '.join(argv[1:])}", file=sys.stderr, flush=True)
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    print(f"  {time.monotonic() - started:.0f} s: {done.stdout.strip().splitlines()[-1][:400]}", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rounds(large: bool, work: Path | None) -> Iterator[Figure]:
    place = ["--work", str(work)] if work else []
    found = run("rounds", "--prompts", str(BATCH), *place)
    yield "controller's peak over a round, 8,192 × 8", "6,540 MB", "≤ 400 MB", f"{found['peak_mb']:.0f} MB"
    yield "controller's CPU seconds of a round, 8,192 × 8", "77", "≤ 25", f"{found['cpu']:.1f}"
    yield "bytes on disk a round, 8,192 × 8", "814 MB", "≤ 420 MB", f"{found['disk_mb']:.0f} MB"
    if large:
        found = run("rounds", "--prompts", str(LARGE), *place)
        yield (
            "controller's peak over a round, 64k × 8",
            "51 GB (extrapolated)",
            "≤ 600 MB",
            f"{found['peak_mb']:.0f} MB",
        )
        yield "controller's CPU seconds of a round, 64k × 8", "about 600 (extrapolated)", "", f"{found['cpu']:.1f}"


def figures(part: str, large: bool, work: Path | None) -> Iterator[Figure]:
    if part == "round":
        yield from rounds(large, work)
    elif part == "import":
        found = run("prompts", "--import", "100000", "--draw", "0")
        now = f"{found['import_wall']:.1f} s, +{found['import_grown_mb']:.0f} MB"
        yield "import of 100k prompts × 434 tokens", "55 s, +2.0 GB", "≤ 20 s on two cores, ≤ +300 MB", now
    elif part == "draw":
        found = run("prompts", "--import", "0", "--draw", "1000000")
        yield "draw and read 8,192 of a pool of 1 M", "about 13 s a round", "≤ 1 s", f"{found['draw_and_write']:.2f} s"
    elif part == "pipe":
        found = run("pipe", "64")
        yield "a 64 MB answer of a child", "7.7 CPU s", "≤ 1 s", f"{found['cpu_seconds']:.2f} CPU s"
    elif part == "ledger":
        found = run("ledger", "--rounds", "10000")
        yield "waiting daemon at 10,000 rounds", "75 ms a second", "≤ 2 ms", f"{found['waiting_tick']:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; may be repeated")
    parser.add_argument("--large", action="store_true", help="measure a round of 64k prompts × 8 too")
    parser.add_argument("--work", type=Path, help="folder for run folders; by default a temporary one")
    args = parser.parse_args()
    if args.work is not None and not args.work.is_dir():
        parser.error(f"--work {args.work}: no such folder")
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    found = [line for part in args.only or PARTS for line in figures(part, args.large, args.work)]
    widths = [max(len(row[column]) for row in found) for column in range(4)]
    for row in [("figure", "before", "to reach", "now"), *found]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
