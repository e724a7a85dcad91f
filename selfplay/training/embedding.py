"""Which prompts stand for all: the trainer embeds and clusters them for the stage `prompts`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.training.jobs import EmbedJob
from selfplay.training.service import Trainer
from selfplay.types import Policy


def representatives(
    drawn: Path,
    keep: int,
    *,
    trainer: Trainer,
    policy: Policy,
    config: Config,
    seed: int,
    breathe: Callable[[str], None],
) -> dict[str, Any]:
    """Which `keep` of the prompts in the file `drawn` stand for all, as `embed_job.embed` gives it. Raises TrainError."""
    settings = config.breadth
    job = EmbedJob(
        prompts=drawn,
        embedding=settings.embedding,
        pooling=settings.pooling,
        policy=Path(policy.path),
        dtype=config.policy.dtype,
        keep=keep,
        clusters=settings.clusters,
        seed=seed,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return trainer.order("embed", job, lambda event: breathe("shard"))
