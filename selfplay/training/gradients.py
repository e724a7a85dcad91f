"""Gradient features of base pairs, which the trainer computes for the stage `depth`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.progress import Line
from selfplay.stage import Metrics
from selfplay.training.jobs import FeaturesJob, LoraJob
from selfplay.training.service import Trainer
from selfplay.types import Policy, Reference


def gradients(
    out: Path,
    kept: int,
    line: Line,
    *,
    trainer: Trainer,
    pairs: Path,
    policy: Policy,
    reference: Reference,
    beta: float,
    config: Config,
    seed: int,
    meanwhile: Callable[[], object],
    breathe: Callable[[str], None],
) -> Metrics:
    """Write the gradient features of the `kept` base pairs in the file `pairs`, and their clusters, to `out`; metrics.

    policy: where gradients are taken, the one that sampled. beta: of the training that follows. meanwhile: work for the
    engine; where engine and trainer share a GPU the engine sleeps from here to the end of training. Raises TrainError.
    """
    settings = config.train
    job = FeaturesJob(
        pairs=pairs,
        policy=Path(policy.path),
        reference=Path(reference.path),
        out=out,
        dim=config.depth.dim,
        layers=config.depth.layers,
        clusters=config.depth.clusters or max(1, round(math.sqrt(kept))),
        closeness=config.depth.closeness,
        seed=seed,
        micro_batch_pairs=settings.micro_batch_pairs,
        lora=None if settings.lora is None else LoraJob.model_validate(settings.lora.model_dump()),
        dtype="bfloat16" if settings.bf16 else "float32",
        gradient_checkpointing=settings.gradient_checkpointing,
        beta=beta,
        epsilon=settings.epsilon,
        label_smoothing=settings.label_smoothing,
        nll_weight=settings.nll_weight,
        trust_remote_code=config.policy.trust_remote_code,
    )
    line.update(text="gradients of the base pairs")

    def progress(event: dict[str, Any]) -> None:
        breathe("shard")  # what a stop loses is seconds: this part is not kept
        line.update(text=f"gradients of {event['done']} of {kept} base pairs")

    found = trainer.order("features", job, progress, meanwhile, last=False)
    return {name: math.nan if value is None else value for name, value in found.items()}
