#!/usr/bin/env python
"""What each method is worth: whole runs on the tiny world, one for each arm and seed, with equal budgets.

    python scripts/ablate.py [--arms plain potential …] [--seeds 7] [--worlds 0 1] [--rounds 3] [--out runs/ablation]

**Arms.** The name of an arm is made of components joined by «+». They are a selection (`potential`, `explicit`, `implicit`
or `signed`; without one it is random), `epsilon` (ε-DPO instead of DPO), a depth (`gradient` or `uniform`) and `breadth`.
`plain` has none of them. Every arm generates as many candidates and trains on as many pairs a round as any other. An arm
with depth draws half the prompts, and samples twice the candidates and keeps twice the pairs of each.

**Controls** take what surrounds a method without the method. `deep` has the prompts and candidates of depth, but one pair of
each prompt. `lower-beta` is DPO with the β that ε-DPO has on average. In `others`, depth follows a closeness that leaves the
pair itself out. In `ahead`, every round but the first is sampled by the policy before the current one (`schedule.ahead`).

**Neighbours** are methods of other papers, each added to `plain`: `easiest` (pairs of the easier half of the prompts alone, arXiv
2510.05534), `two-sigma` (the rejected answer at μ − 2σ, 2502.16825), `fused` (both margins as one probability, 2502.14560),
`replay` (a fifth of the pairs are of earlier rounds, but in round 1) and `ema` (the reference follows the policies as a moving average).

**Worlds and seeds.** A world is a base policy with its own reward model, prompts and rubric (`make_tiny.py --seed`). A seed
decides which prompts are drawn and what is sampled. With `--pool redundant`, seven of eight prompts that a run can draw ask
one of twenty questions in other words. With `--pool learnable`, none of them is one that the policy cannot learn to answer
(`hopeless`). Both are evaluated on the same held-out prompts.

**Runs.** Arms of a seed share what is the same by construction: the imported prompts, and the stages of round 1 that come
before selection. The gate lets everything through, so that it cannot hide a bad arm. After the last round the policy answers
every held-out prompt. The same call goes on where an interrupted one stopped. Each process has one thread, and `--workers`
runs go on at a time.

**A real model.** With `--world smollm2` the arms run as `configs/smollm2.yaml` says, and the audit prompts, whose topics are not
trained on, judge: what share of the answers follows all constraints. A round takes a quarter of an hour on two cores.

**Results.** A finished run adds a line to `--results`, and `--report` makes the tables and a picture from these lines. A line
counts for the settings, the world and the number of rounds that it was made with; a call with others does its own runs.
Intervals come from a bootstrap of Student's t over the seeds of each world, because a percentile interval of 14 values is too
narrow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ablation.arms import ARMS, CONTROLS, NEIGHBOURS, POOLS, REDUNDANT, overrides
from ablation.report import report
from ablation.runs import run_all, unit
from ablation.worlds import budget, worlds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms",
        nargs="+",
        help=f"the first is what others are held against; controls: {' '.join(CONTROLS)}; neighbours: {' '.join(NEIGHBOURS)}",
    )
    parser.add_argument(
        "--world",
        choices=["tiny", "smollm2"],
        default="tiny",
        help="what kind of world the arms run in (default: tiny)",
    )
    parser.add_argument("--seeds", type=int, default=7, help="run seeds for each world (default: 7)")
    parser.add_argument("--first-seed", type=int, default=1000, help="the first run seed (default: 1000)")
    parser.add_argument("--worlds", type=int, nargs="+", help="seeds of the tiny worlds (default: 2 3)")
    parser.add_argument("--pool", choices=["usual", *POOLS], default="usual", help="the prompts to draw from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", help="default: configs/tiny.yaml or configs/smollm2.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for every arm")
    parser.add_argument("--results", type=Path, default=Path("docs/ablations.jsonl"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="runs at a time (default: 2 in the tiny worlds, 1 of SmolLM2)")
    parser.add_argument("--report", action="store_true", help="no runs: table and picture of what is there")
    parser.add_argument("--unit", nargs=2, metavar=("WORLD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.world != "tiny" and (args.pool != "usual" or args.worlds):
        parser.error("--pool and --worlds are those of the tiny worlds")
    args.config = args.config or f"configs/{args.world}.yaml"
    args.worlds = args.worlds or ([2, 3] if args.world == "tiny" else [0])
    args.workers = args.workers or worlds(args).WORKERS
    args.arms = args.arms or (ARMS if args.pool == "usual" else REDUNDANT)
    for arm in args.arms:
        overrides(arm, budget(args))
    if args.unit:
        unit(args, int(args.unit[0]), int(args.unit[1]))
        return
    if not args.report:
        run_all(args)
    report(args)


if __name__ == "__main__":
    main()
