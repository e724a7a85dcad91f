#!/usr/bin/env python
"""What a long answer of a child costs the controller: `python scripts/scale/pipe.py 1 8 64` (megabytes).

A real child sends rows of token ids over the real protocol, and the controller reads and parses them. One line of JSON is
printed for each size.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from selfplay.processes.child import Child  # noqa: E402
from selfplay.processes.protocol import protocol  # noqa: E402

ROW_TOKENS = 1000


def measure(megabytes: int) -> dict[str, float]:
    """CPU and wall seconds of the controller for one answer of so many megabytes (1e6 bytes), parsing included.

    `parse_cpu_seconds` is what `json.loads` alone takes for the same answer. The pipe can only add to that.
    """
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, str(Path(__file__).resolve()), "--child"]
        child = Child("answers", argv, run_dir=Path(folder), log=Path(folder) / "answers.log")
        child.start()
        try:
            child.wait_for("ready")
            cpu, wall = time.process_time(), time.perf_counter()
            rows = child.order("answer", megabytes=megabytes)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        finally:
            child.stop()
    line = json.dumps(rows).encode()
    del rows
    parse = time.process_time()
    json.loads(line)
    parse = time.process_time() - parse
    return {"megabytes": len(line) / 1e6, "cpu_seconds": cpu, "wall_seconds": wall, "parse_cpu_seconds": parse}


def answer_orders() -> None:
    """The child: it answers each order with rows of token ids that are `megabytes` long as JSON."""
    channel = protocol()
    rng = random.Random(0)
    row = [rng.randrange(10_000, 150_000) for _ in range(ROW_TOKENS)]
    length = len(json.dumps(row)) + len(", ")
    channel.ready()
    for order in channel.orders():
        channel.result(order, [row] * max(1, round(order["megabytes"] * 1e6 / length)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("megabytes", type=int, nargs="*", default=[1, 8, 64], help="sizes of the answer")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return answer_orders()
    for megabytes in args.megabytes:
        print(json.dumps({name: round(value, 3) for name, value in measure(megabytes).items()}), flush=True)


if __name__ == "__main__":
    main()
