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
    """Scale of the adapter: its update is multiplied by alpha / r."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Layers that get an adapter."""


class EveryN(Section):
    every: Positive
    """Rounds between refreshes of the reference."""


class Ema(Section):
    ema: Annotated[float, Field(gt=0, lt=1)]
    """Share that the policy which samples a round has in the reference of this round. The rest is the reference of the
    round before, which is the initial policy at first. The soft updates of TRL have 0.6."""


class TrainConfig(Section):
    lora: LoraConfig | None = None
    """Train an adapter, and merge it with the policy in fp32. Without this section all weights are trained."""
    learning_rate: Annotated[float, Field(gt=0)] = 7e-7
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape of the learning rate over a round."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a round's steps with a rising learning rate, from 0 on. A round of one step has none."""
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
    """ε of ε-DPO. 0 is plain DPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference is the wrong way round (λ)."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen response's negative log-likelihood (mean over its tokens) beside the preference loss."""
    max_chosen_drop: Annotated[float, Field(gt=0)] | None = 50.0
    """A warning is recorded if both chosen and rejected responses lose more than this to the reference (nats a
    response, mean of the last ten steps). The policy then avoids the data instead of telling its pairs apart. null:
    there is no warning."""
    reference: Literal["previous", "initial"] | EveryN | Ema = "previous"
    """The reference of the training. `previous`: the policy that sampled the round. `initial`: the initial policy.
    `{every: n}`: a policy that is replaced every n rounds. `{ema: share}`: a moving average of the policies, which
    moves once a round."""
    replay: Annotated[float, Field(ge=0)] = 0.0
    """Pairs of earlier rounds that are trained on again, for each pair of the round. They are drawn by a seed from the
    pairs of the last `replay_rounds` rounds. Retention never deletes these files. 0: there are none."""
    replay_rounds: Positive = 3
    """Earlier rounds that `replay` draws from. Rounds that were given up do not count."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    bf16: bool = False
    """Mixed precision: matrix products are in bf16. Weights, optimizer and losses stay in fp32."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass. It takes less memory, and a third more time."""
    save_steps: Positive = 50
    """Optimizer steps between two saves. An interruption loses no more than these."""
    min_update: Annotated[float, Field(ge=0)] = 1e-7
    """A round whose update is smaller than this (relative norm) fails as «no update»."""
    agreement_mean: Annotated[float, Field(gt=0)] | None = None
    """Bound on the mean difference between the log-probabilities of trainer and engine (nats a token). The default is
    1e-3 in fp32, and 5e-2 in lower precision."""
    agreement_p99: Annotated[float, Field(gt=0)] | None = None
    """Bound on the 99th percentile of that difference. The default is 1e-2 in fp32, and 2.5e-1 in lower precision."""
    agreement_pairs: Positive = 256
    """Pairs of the round, drawn by a seed, whose log-probabilities are compared before the first step."""
    accelerate: Path | None = None
    """Configuration file for `accelerate launch` (processes, FSDP). Without one the trainer is a single plain
    process."""
    stay: bool = True
    """Whether the trainer lives as long as the run. Between its orders it holds no more of a GPU than its context. With
    false it ends after each round, or before the engine wakes if they share GPUs. That frees the memory of this
    context, and of the policies that the trainer keeps on the host. Behind the launcher of accelerate it always ends
    then."""
    cpu_threads: Positive | None = None
    """Threads of the trainer on a CPU. null: all cores that it may use. If that leaves no core to the engine, the
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
