#!/usr/bin/env python
"""Run self-play rounds: `python scripts/round.py --config configs/tiny.yaml`.

Completes an unfinished round first. Exit codes: 0 promoted, rejected by the gate or skipped; 2 bad configuration or
input; 3 a stage failed; 130 interrupted (the same command goes on).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="A.B=C", help="override a value of the config; may be repeated"
    )
    parser.add_argument("--run-dir", type=Path, help="run folder (default: <run.dir>/<run.name> of the config)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="rounds the folder has at the end (default: one more than now)"
    )
    parser.add_argument("--report", action="store_true", help="write report.html and report.png at the end")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    from selfplay.rounds.command import leave, run_rounds

    leave(run_rounds(args.config, args.set, args.run_dir, args.rounds, args.report))
