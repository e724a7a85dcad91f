"""The section `train`: ε-DPO, its optimizer, and the process that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfplay.config.base import Positive, Section


class LoraConfig(Section):
    r: Positive = 64
    """Rank."""
    alpha: Positive = 128
    """Scale: the update is multiplied by alpha / r."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter."""


class EveryN(Section):
    every: Positive
    """Rounds between refreshes of the reference."""


class Ema(Section):
    ema: Annotated[float, Field(gt=0, lt=1)]
    """Share of the policy that samples a round in the reference of this round; the rest is the reference of the round before,
    at first the initial policy. TRL's soft updates have 0.6."""


class TrainConfig(Section):
    lora: LoraConfig | None = None
    """Train an adapter and merge it in fp32; without it all weights are trained."""
    learning_rate: Annotated[float, Field(gt=0)] = 7e-7
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over a round."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a round's steps with a rising learning rate."""
    epochs: Positive = 1
    """Passes over a round's pairs."""
    batch_pairs: Positive = 128
    """Pairs in an optimizer step, over all processes."""
    micro_batch_pairs: Positive = 1
    """Pairs in one forward and backward of one process."""
    max_length: Positive = 2048
    """Longest prompt plus response (tokens). Nothing is ever truncated: the limits of prompts and responses must fit."""
    beta: Annotated[float, Field(gt=0)] = 0.01
    """β at the start of a round whose reference was refreshed."""
    beta_min: Annotated[float, Field(gt=0)] = 1e-4
    """Lower bound of β."""
    beta_max: Annotated[float, Field(gt=0)] = 1.0
    """Upper bound of β."""
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """ε of ε-DPO; 0 is plain DPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """λ: probability that a preference is the wrong way round."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen response's negative log-likelihood (mean over its tokens) beside the preference loss."""
    max_chosen_drop: Annotated[float, Field(gt=0)] | None = 50.0
    """A warning is recorded when chosen and rejected responses both lose more than this to the reference (nats a response,
    mean of the last ten steps): the policy then avoids the data instead of telling its pairs apart. null for none."""
    reference: Literal["previous", "initial"] | EveryN | Ema = "previous"
    """The reference: the policy that sampled the round, the initial one, one refreshed `every: n` rounds, or a moving average
    of the policies (`ema: share`), which moves once a round."""
    replay: Annotated[float, Field(ge=0)] = 0.0
    """Pairs of earlier rounds that are trained on again, for each pair of the round; 0: none. A seed draws them from what the
    last `replay_rounds` rounds trained on. Retention never deletes these files."""
    replay_rounds: Positive = 3
    """Earlier rounds that `replay` draws from, those aside that were given up."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    bf16: bool = False
    """Mixed precision: matrix products in bf16; weights, optimizer and losses stay in fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    save_steps: Positive = 50
    """Optimizer steps between saves: the most that an interruption can lose."""
    min_update: Annotated[float, Field(ge=0)] = 1e-7
    """A round whose update is smaller than this (relative norm) fails as «no update»."""
    agreement_mean: Annotated[float, Field(gt=0)] | None = None
    """Bound on the mean |trainer − engine| log-probability (nats a token); by default 1e-3 in fp32, 5e-2 below."""
    agreement_p99: Annotated[float, Field(gt=0)] | None = None
    """Bound on the 99th percentile of the same; by default 1e-2 in fp32, 2.5e-1 below."""
    agreement_pairs: Positive = 256
    """Pairs of the round, drawn by a seed, whose log-probabilities are compared before the first step."""
    accelerate: Path | None = None
    """Configuration file for `accelerate launch` (processes, FSDP); without one the trainer is a single plain process."""
    stay: bool = True
    """The trainer lives as long as the run, and between its orders it holds no more of a GPU than its context. false ends it
    after each round, or before the engine wakes where they share GPUs: for those who need the memory of that context, or of the
    policies that it keeps on the host. Behind accelerate's launcher it always ends then."""
    cpu_threads: Positive | None = None
    """Threads of the trainer on a CPU; null for all cores that it may use. Where that leaves no core to the engine, the
    champion answers the held-out prompts before the training, and not beside it."""
    silence: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds without a sign of progress after which the trainer is taken for hung."""

    @model_validator(mode="after")
    def _beta_bounds(self) -> TrainConfig:
        if not self.beta_min <= self.beta <= self.beta_max:
            raise ValueError(f"beta {self.beta} is outside [beta_min, beta_max] = [{self.beta_min}, {self.beta_max}]")
        return self

    @model_validator(mode="after")
    def _whole_batches(self) -> TrainConfig:
        if self.batch_pairs % self.micro_batch_pairs:
            raise ValueError(
                f"batch_pairs {self.batch_pairs} is not a multiple of micro_batch_pairs {self.micro_batch_pairs}"
            )
        return self
