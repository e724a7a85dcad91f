#!/usr/bin/env python
"""Warm rounds on a Ray cluster against the same rounds without Ray: `python scripts/bench_cluster.py [--repeats 5]`.

    one node     one engine, all children on the one node of a cluster, against the same children of the controller
    two nodes    two engines, each on a node of its own, against a pool of two on this machine

The nodes are processes of this machine. Both sides keep their processes and alternate. One line is printed for each figure: the
median of the ratios of two rounds next to each other, with the least and the greatest (goal: 1.05).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from bench_round import SETTINGS, cpu_seconds  # noqa: E402
from cluster_world import two_nodes  # type: ignore[import-not-found]  # noqa: E402

GOAL = 1.05
CPUS = 8  # of each node: Ray counts them, nothing is bound to them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", type=int, choices=[1, 2], action="append", help="by default one, then two")
    parser.add_argument("--rounds", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds:
        rounds(args.config, args.set, args.rounds)
        return
    for nodes in args.nodes or [1, 2]:
        compare(args, nodes)


def compare(args: argparse.Namespace, nodes: int) -> None:
    sets = [*args.set, *SETTINGS, f"generate.engines={nodes}"]
    with tempfile.TemporaryDirectory() as folder, two_nodes(0, *[CPUS] * nodes) as cluster:
        on_ray = [f"cluster.address={cluster.address}", f"cluster.engine.spread={json.dumps(nodes > 1)}"]
        sides = {
            name: Side(args.config, [*sets, *more], Path(folder) / name)
            for name, more in (("here", []), ("ray", on_ray))
        }
        try:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for repeat in range(args.repeats):
                for name in list(sides)[:: 1 if repeat % 2 else -1]:
                    found[name].append(one := sides[name].round())
                    print(f"{nodes} {name:5s}" + "".join(f" {k} {v:.2f}" for k, v in one.items()), flush=True)
        finally:
            for side in sides.values():
                side.end()
    for figure in ("round", "generate", "CPU"):
        ratios = [ray[figure] / here[figure] for here, ray in zip(found["here"], found["ray"], strict=True)]
        print(
            f"{nodes} node{'s' * (nodes > 1)}, {figure}: with Ray ÷ without {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), goal {GOAL}"
        )


class Side:
    """A controller in a process of its own, which runs a round when it is told to."""

    def __init__(self, config: str, sets: list[str], folder: Path) -> None:
        folder.mkdir()
        self._log = (folder / "log").open("w+")
        argv = [sys.executable, __file__, "--config", config, "--rounds", str(folder / "run")]
        argv += [word for one in sets for word in ("--set", one)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=os.environ, text=True
        )
        self.round()  # starts engines, reward and trainer

    def round(self) -> dict[str, float]:
        """Run one; its wall-clock seconds, those of its stages that take long, and CPU seconds without those of Ray."""
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


def rounds(config_path: str, sets: list[str], run_dir: Path) -> None:
    """A round for each line on stdin, and a line of JSON on stdout for each."""
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with Run(load(config_path, sets), run_dir, Display()) as run:
        for _ in sys.stdin:
            wall, cpu = time.monotonic(), cpu_seconds(run_dir) if run_dir.exists() else 0.0
            report = run_round(run)
            told: dict[str, Any] = {"round": time.monotonic() - wall, "CPU": cpu_seconds(run_dir) - cpu}
            told |= {stage: report.seconds[stage] for stage in ("generate", "score", "train", "evaluate", "promote")}
            answers.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
