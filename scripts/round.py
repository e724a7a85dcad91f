#!/usr/bin/env python
"""Run self-play rounds: `python scripts/round.py --config configs/tiny.yaml`.

Completes an unfinished round first. Exit codes: 0 promoted, rejected by the gate or skipped; 2 bad configuration or
input; 3 a stage failed; 130 interrupted (the same command goes on).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if TYPE_CHECKING:
    from selfplay.run import Run


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


def main() -> int:
    args = arguments()
    from selfplay.display import Display
    from selfplay.errors import ConfigError, SelfplayError

    display = Display()
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, _interrupt)
    run_dir = args.run_dir
    try:
        from selfplay.artifacts import disk_errors
        from selfplay.config import load
        from selfplay.run import Run

        if args.rounds is not None and args.rounds < 1:
            raise ConfigError(f"--rounds {args.rounds}: at least 1")
        config = load(args.config, args.set)
        run_dir = args.run_dir or config.run_dir
        with disk_errors(run_dir), Run(config, run_dir, display) as run:
            rounds(run, args.rounds)
            if args.report:
                run.write_report()
        return 0
    except SelfplayError as error:
        display.error(error)
        return error.exit_code
    except KeyboardInterrupt:
        display.note("interrupted: the same command goes on where this one stopped")
        return 130
    except Exception as error:
        log = (run_dir or Path()) / "logs" / "round.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(traceback.format_exc())
        except OSError:
            traceback.print_exc()
        display.error(f"{type(error).__name__}: {error}", "this is a bug: please report it with the log", log)
        return 3


def rounds(run: Run, total: int | None) -> None:
    """Do rounds until the folder has `total` of them; with None one more than now, or the unfinished one."""
    from selfplay.round import run_round

    finished = [r for r in run.store.rounds() if r["state"] != "running"]
    target = len(finished) + 1 if total is None else total
    if len(finished) >= target:
        run.display.note(f"{run.dir} has its {target} rounds already")
        run.display.run_table(run.store)
        return
    for _ in range(target - len(finished)):
        run.display.round_table(run_round(run))


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Threads that wait for answers nobody wants any more must not hold up the exit.
    os._exit(code)
