#!/usr/bin/env python
"""A controller in a process of its own that runs a warm round whenever it is told to: what benches compare, in turns.

`Side` starts it with this file as its program.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_round import SETTINGS, cpu_seconds  # noqa: E402

STAGES = ("generate", "score", "train", "evaluate", "promote")


class Side:
    """One controller. Its first round, which starts engines, reward and trainer, is over when this is made."""

    def __init__(self, config: str, sets: list[str], folder: Path, root: Path = ROOT) -> None:
        """root: of the code that runs, in which its children are started too."""
        folder.mkdir()
        self._log = (folder / "log").open("w+")
        argv = [sys.executable, str(root / "scripts" / Path(__file__).name), "--config", config, str(folder / "run")]
        argv += [word for one in (*sets, *SETTINGS) for word in ("--set", one)]
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(root)},
            cwd=root,
            text=True,
        )
        self.round()

    def round(self) -> dict[str, float]:
        """Run one; its wall-clock seconds, those of its stages that take long, and CPU seconds of the run's processes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"a round failed:\n{self._log.read()[-3000:]}")
        found: dict[str, float] = json.loads(line)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def in_turns(sides: Mapping[str, Side], repeats: int, what: str = "") -> dict[str, list[dict[str, float]]]:
    """What the rounds of each side took, who begins in turn; each is printed. All sides have ended then."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for repeat in range(repeats):
            for name in list(sides)[:: 1 if repeat % 2 else -1]:
                found[name].append(one := sides[name].round())
                print(f"{what}{name:8s}" + "".join(f" {k} {v:.2f}" for k, v in one.items()), flush=True)
    finally:
        for side in sides.values():
            side.end()
    return found


def main() -> None:
    """A round for each line on stdin, and a line of JSON on stdout for each."""
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with Run(load(args.config, args.set), args.run_dir, Display()) as run:
        for _ in sys.stdin:
            wall, cpu = time.monotonic(), cpu_seconds(run.dir)
            report = run_round(run)
            told: dict[str, Any] = {"round": time.monotonic() - wall, "CPU": cpu_seconds(run.dir) - cpu}
            answers.write(json.dumps(told | {stage: report.seconds[stage] for stage in STAGES}) + "\n")


if __name__ == "__main__":
    main()
