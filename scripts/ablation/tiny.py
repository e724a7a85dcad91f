"""Tiny worlds, each with its own base policy, reward model, prompts and rubric, and the prompts that arms draw from."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablation.arms import ALL, ARMS, REDUNDANT
from ablation.worlds import ROOT, Expected

# What is expected of which difference. It was fixed before the runs: (arm, against, metric, least lower bound of the interval).
COMPARISONS: list[Expected] = [
    ("potential", "plain", "reward", 0.0),
    *((arm, "plain", "gold", -0.02) for arm in ARMS[1:]),
    ("epsilon", "plain", "gold_per_nat", 0.0),
    ("breadth+gradient", "breadth+uniform", "gold", 0.0),
    ("breadth+gradient", "breadth+uniform", "reward", 0.0),
    ("breadth+gradient", "plain", "gold", 0.0),
    (ALL, "plain", "gold", 0.0),
    (ALL, "plain", "reward", 0.0),
]
# The same where prompts are redundant. Breadth is expected to help with depth and without it, and both to beat one pair a
# prompt.
REDUNDANT_COMPARISONS: list[Expected] = [
    *(("breadth-last+deep", "deep", metric, 0.0) for metric in ("gold", "reward")),
    *(("breadth-last+uniform", "uniform", metric, 0.0) for metric in ("gold", "reward")),
    *((arm, "plain", metric, 0.0) for arm in REDUNDANT[4:] for metric in ("gold", "reward")),
    *(("breadth-last+gradient", "breadth-last+uniform", metric, 0.0) for metric in ("gold", "reward")),
]
METRICS = {
    "reward": "held-out reward",
    "gold": "gold total",
    "content": "gold content",
    "win": "gold win rate against the initial policy",
    "kl": "KL to the initial policy (nats an answer)",
    "gold_per_nat": "gold gained per nat of KL",
    "length": "tokens an answer",
}
PICTURED = ("reward", "gold", "content", "kl", "length")
LAST = {"evaluate.prompts": 100_000, "evaluate.audit_every": 1, "evaluate.audit_prompts": 100_000}
WORKERS = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


def build(args: argparse.Namespace, world: int) -> None:
    if not (world_dir(world) / "current").exists():
        print(f"building the world of seed {world}", flush=True)
        argv = [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--seed", str(world)]
        subprocess.run([*argv, "--out", str(world_dir(world))], check=True)
    if args.pool != "usual":
        write_pool(args, world)


def world_dir(seed: int) -> Path:
    """The folder that `make_tiny.py` builds the world of this seed in."""
    return ROOT / ".cache" / ("tiny" if seed == 0 else f"tiny-{seed}")


def built(world: int) -> str:
    """The hash of the recipe that a world was built by."""
    return (world_dir(world) / "current").resolve().name


def pool(args: argparse.Namespace, world: int) -> Path:
    """The file of the prompts to draw from."""
    if args.pool == "usual":
        return world_dir(world) / "current" / "train.jsonl"
    return Path(args.out / f"world-{world}-{built(world)}-{args.pool}.jsonl")


def write_pool(args: argparse.Namespace, world: int) -> None:
    """Write the file of a pool that is not the usual one.

    Of each skill it has one question in all its wordings, and twelve others, or as many as there are, in one wording each.
    """
    from selfplay.worlds.tiny import questions, rewriter
    from selfplay.worlds.tiny.skills import SKILLS

    wordings: dict[str, dict[str, list[str]]] = {}  # skill → matter → prompts
    for line in (world_dir(world) / "current" / "train.jsonl").read_text().splitlines():
        text = json.loads(line)["messages"][-1]["content"]
        parsed = rewriter.parse(text)
        assert parsed is not None, f"{text!r} is not of the tiny world"
        skill, _, matter = parsed
        wordings.setdefault(skill, {}).setdefault(matter, []).append(text)
    found: list[str] = []
    for skill, matters in wordings.items():
        if args.pool == "learnable" and SKILLS[skill].regime == "hopeless":
            continue
        popular, *others = sorted(matters, key=lambda matter: questions.unit("redundant", skill, matter))
        found += rewriter.wordings(skill, popular)
        found += [matters[matter][0] for matter in others[:12]]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in found if not questions.held_out(text)]
    pool(args, world).write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(args: argparse.Namespace, world: int) -> dict[str, Any]:
    here = (world_dir(world) / "current").resolve()
    return {
        "policy.model": str(here / "policy"),
        "prompts.source": str(pool(args, world)),
        "prompts.heldout": str(here / "heldout.jsonl"),
    }


@contextlib.contextmanager
def reward(world: int) -> Iterator[dict[str, Any]]:
    model = (world_dir(world) / "current").resolve() / "reward"
    server = subprocess.Popen(
        [sys.executable, "-m", "reward.server", "--model", str(model), "--dtype", "float32", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        yield {"reward.model": None, "reward.url": [json.loads(server.stdout.readline())["url"]]}
    finally:
        server.terminate()
        server.wait()


def expected(args: argparse.Namespace) -> Sequence[Expected]:
    return COMPARISONS if args.pool == "usual" else REDUNDANT_COMPARISONS


def measured(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the answers to all held-out prompts."""
    from selfplay.storage import tables
    from selfplay.types import Scored

    folder = run_dir / "rounds" / f"{len(metrics):04d}" / "evaluate"
    answers = [row for name in ("candidate", "audit") for row in tables.read_rows(folder / f"{name}.parquet", Scored)]
    end = metrics[-1]
    gained = end["evaluate/audit_gold_total"] - end["evaluate/audit_gold_total_initial"]
    return {
        "reward": statistics.fmean(row.reward for row in answers if row.reward is not None),
        "gold": statistics.fmean(row.reward_parts["total"] for row in answers),
        "content": statistics.fmean(row.reward_parts["content"] for row in answers),
        "win": end["evaluate/audit_gold_win_rate"],
        "kl": end["evaluate/kl_initial"],
        "gold_per_nat": gained / end["evaluate/kl_initial"],
        "length": statistics.fmean(row.n_tokens for row in answers),
        "answers": len(answers),
    }
