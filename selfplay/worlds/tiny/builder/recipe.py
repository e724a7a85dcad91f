"""What a tiny world is made from: its recipe, and the hash that its folder is named by."""

import ast
import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

SOURCES = Path(__file__).resolve().parents[1]
"""The package of the tiny world. A change of any module in it makes another world."""

Judge = Literal["reward", "judge"]
"""The model that trains, and the one that judges at the gate. They share no random number."""
JUDGES: tuple[Judge, ...] = ("reward", "judge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that the world depends on, the sources and library versions apart."""

    seed: int = 0
    workers: int = 2
    """Processes that share each step. They are part of the recipe, because sums over them round differently."""
    scale: float = 1.0
    """Multiplies how many prompts each skill has."""
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 768
    positions: int = 512
    sft_examples: int = 40_000
    sft_batch: int = 24
    sft_lr: float = 5e-3
    group_prompts: int = 5_000
    """Prompts of the reward model's training set, each with a group of answers."""
    group_sampled: int = 2
    """Answers of a group that the policy sampled. Four more are added to them: one sampled at a higher temperature, two
    synthetic ones of one style but different content, and a hostile one."""
    heat: float = 1.4
    """Temperature of that one, because a policy under optimisation strays from what it samples at 1."""
    judge_prompts: int = 4_000
    """The same for the judge, whose groups are its own."""
    reward_batch: int = 12
    """Groups per optimizer step."""
    reward_epochs: int = 1
    reward_lr: float = 1e-3
    sharpness: float = 12.0
    """Nats of preference per unit of gold: P(a over b) = σ(sharpness · (gold_a − gold_b))."""
    rater_noise: float = 0.25
    """Standard deviation of what a rater adds to the gold of an answer about taste."""
    max_tokens: int = 48


SIZES = {
    "full": Recipe(),
    "mini": Recipe(
        workers=1,
        scale=0.15,
        hidden=64,
        heads=2,
        feed_forward=256,
        sft_examples=12_000,
        sft_lr=8e-3,
        group_prompts=900,
        judge_prompts=600,
        reward_lr=2e-3,
    ),
}


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all that the world is made from. Comments and layout of the sources do not count."""
    sources = {
        path.relative_to(SOURCES).as_posix(): ast.dump(ast.parse(path.read_text(encoding="utf-8")))
        for path in SOURCES.rglob("*.py")
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers")}
    text = json.dumps([asdict(recipe), versions, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
