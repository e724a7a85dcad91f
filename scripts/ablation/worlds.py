"""The worlds that arms run in, and the prompts that they draw from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
