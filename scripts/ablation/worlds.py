"""What kinds of worlds arms run in, and what the ablation asks each of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from ablation.arms import Budget

ROOT = Path(__file__).resolve().parents[2]
Expected = tuple[str, str, str, float]
"""A difference that was expected before the runs: arm, against which other, in what, and the least lower bound of its interval."""


class Worlds(Protocol):
    """Base policies with their prompts and rewards, by numbers."""

    METRICS: Mapping[str, str]
    """What a run is measured by: column → name."""
    PICTURED: Sequence[str]
    """Those of them that the picture shows."""
    LAST: Mapping[str, Any]
    """What the last round of a run evaluates."""
    WORKERS: int
    """Runs that go on at a time by default."""
    ENVIRONMENT: Mapping[str, str]
    """That of a run, beside what there is."""

    def build(self, args: argparse.Namespace, world: int) -> None:
        """Make a world unless it is there, and the prompts that arms draw from."""

    def built(self, world: int) -> str:
        """The hash of what a world was made of."""

    def settings(self, args: argparse.Namespace, world: int) -> dict[str, Any]:
        """What every arm has in a world."""

    def reward(self, world: int) -> AbstractContextManager[dict[str, Any]]:
        """The reward at work, and the settings that lead to it."""

    def expected(self, args: argparse.Namespace) -> Sequence[Expected]: ...

    def measured(self, run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What the last policy of a finished run reached. `metrics`: those of its rounds, the last of which has an audit."""


def worlds(args: argparse.Namespace) -> Worlds:
    """Those that a call runs in."""
    from ablation import smollm2, tiny

    return smollm2 if args.world == "smollm2" else tiny


def budget(args: argparse.Namespace) -> Budget:
    """What each arm of a call samples in a round."""
    from selfplay.config import load

    config = load(ROOT / args.config, args.set)
    return Budget(
        prompts=config.prompts.per_round,
        candidates=config.generate.candidates,
        shard_prompts=config.generate.shard_prompts,
    )
