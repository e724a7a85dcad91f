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
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from cluster_world import two_nodes  # type: ignore[import-not-found]  # noqa: E402
from warm_rounds import Side, in_turns  # noqa: E402

GOAL = 1.05
CPUS = 8  # of each node: Ray counts them, nothing is bound to them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", type=int, choices=[1, 2], action="append", help="by default one, then two")
    args = parser.parse_args()
    for nodes in args.nodes or [1, 2]:
        compare(args, nodes)


def compare(args: argparse.Namespace, nodes: int) -> None:
    sets = [*args.set, f"generate.engines={nodes}"]
    with tempfile.TemporaryDirectory() as folder, two_nodes(0, *[CPUS] * nodes) as cluster:
        on_ray = [f"cluster.address={cluster.address}", f"cluster.engine.spread={json.dumps(nodes > 1)}"]
        sides = {
            name: Side(args.config, [*sets, *more], Path(folder) / name)
            for name, more in (("here", []), ("ray", on_ray))
        }
        found = in_turns(sides, args.repeats, f"{nodes} ")
    for figure in ("round", "generate", "CPU"):
        ratios = [ray[figure] / here[figure] for here, ray in zip(found["here"], found["ray"], strict=True)]
        print(
            f"{nodes} node{'s' * (nodes > 1)}, {figure}: with Ray ÷ without {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), goal {GOAL}"
        )


if __name__ == "__main__":
    main()
