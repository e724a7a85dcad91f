"""Orders of the trainer child: what a job says, checked on both sides of the pipe. No torch here: the controller writes them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import MASTERS

Dtype = Literal["float32", "bfloat16", "float16"]
CLUSTERS = "--clusters"  # argument of a trainer that will be asked for clusters
STOP = "stop"
"""A file of this name in a job's `work` asks the trainer to save its state and end the job."""
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Job(BaseModel):
    """What an order is about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def reads(self) -> list[Path]:
        """The files that it is done from."""
        return []


def _weights(folder: Path, masters: bool = True) -> list[Path]:
    """The files that the model of a policy is read from: its masters, where it has them and they are wanted."""
    at = folder / MASTERS if masters and (folder / MASTERS).is_dir() else folder
    return [at / name for name in checkpoints.read(at).files()]


class LoraJob(BaseModel):
    """A fresh adapter, merged in float32 after training. No dropout: the steps of β would be noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Count = 16
    alpha: Positive = 32.0
    target_modules: list[str] | str = "all-linear"


class TrainJob(Job):
    """One round's training. Paths are folders unless they say otherwise; log-probabilities are nats, lengths tokens."""

    pairs: Path
    """Parquet file: prompt_id, prompt_ids, chosen_ids, rejected_ids (list of int), chosen_logp, rejected_logp (float64,
    the generator's summed log-probabilities)."""
    replayed: Path | None = None
    """The same of earlier rounds, to be trained on together with those. The agreement check leaves them out, since other
    policies sampled them."""
    policy: Path
    """Checkpoint to start from; its `masters/` where it has one."""
    reference: Path
    """Checkpoint of the reference; may be the policy."""
    initial: Path
    """Checkpoint whose tokenizer, chat template and generation config every export carries, byte for byte."""
    work: Path
    """Scratch for training checkpoints; a job that is repeated resumes from here."""
    out: Path
    """Where the trained policy goes; appears whole or not at all."""

    serving_dtype: Dtype = "float32"
    lora: LoraJob | None = None
    beta: Positive
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    beta_min: Annotated[float, Field(ge=0)] | None = None
    beta_max: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of −log π(chosen) / its tokens beside the preference loss."""
    learning_rate: Positive
    epochs: Positive = 1.0
    batch_pairs: Count
    """Pairs of an optimizer step, over all processes."""
    micro_batch_pairs: Count
    """Pairs of one forward and backward in one process."""
    processes: Count | None = None
    """Processes that the launcher was told to start; None where that is not known."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 leaves gradients as they are."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_length: Count
    """Longest prompt and response together; a longer pair is an error, never truncated."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0 for none."""
    seed: int = 0
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Mixed precision: matrix products in bf16, weights and losses in float32."""
    agreement_mean: Positive | None = None
    """Largest mean of |reference logp − generator's logp| / tokens over the responses; None where the reference is not
    the policy that sampled."""
    agreement_p99: Positive | None = None
    agreement_pairs: Count = 256
    """Pairs that are compared, drawn by the seed; all where there are no more."""
    min_update: Annotated[float, Field(ge=0)] = 0.0
    """Smallest relative norm of the update that counts as one."""
    canary_ids: list[list[int]] = []
    trust_remote_code: bool = False

    def reads(self) -> list[Path]:
        pairs = [self.pairs, *([self.replayed] if self.replayed else [])]
        beside = [self.policy / "config.json", *checkpoints.companions(self.initial)]
        return [*pairs, *_weights(self.policy), *_weights(self.reference), *beside]


class BlendJob(Job):
    """A moving average of weights: the reference of before has moved towards a policy."""

    before: Path
    """Checkpoint of the reference of before."""
    policy: Path
    """Checkpoint that it moves to."""
    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the policy in the average."""
    initial: Path
    """Checkpoint whose tokenizer and chat template the average carries."""
    out: Path
    """Folder of the average, in float32; appears whole or not at all."""
    trust_remote_code: bool = False

    def reads(self) -> list[Path]:
        beside = [self.policy / "config.json", *checkpoints.companions(self.initial)]
        return [*_weights(self.before), *_weights(self.policy), *beside]


class EmbedJob(Job):
    """Prompts to embed, and how many of them are to stand for all."""

    prompts: Path
    """Parquet file of prompts (n)."""
    embedding: str
    """`policy`, or the folder or Hub id of a sentence-transformers model."""
    pooling: Literal["mean", "last"] = "mean"
    policy: Path
    dtype: Dtype = "float32"
    keep: Count
    """Representatives, at most n."""
    clusters: Count | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def reads(self) -> list[Path]:
        return [self.prompts, *(_weights(self.policy, self.dtype == "float32") if self.embedding == "policy" else [])]


class FeaturesJob(Job):
    """Gradient features of pairs, and their clusters."""

    pairs: Path
    """Parquet file: prompt_id, prompt_ids, chosen_ids, rejected_ids, kept_because; a pair without the last is left out."""
    policy: Path
    """Checkpoint that the gradients are taken at."""
    reference: Path
    """Checkpoint of the reference; may be the policy."""
    out: Path
    """Parquet file of `types.PairGradient` rows, in the order of the pairs, and `feature`, float32 (dim); whole or not
    at all."""

    dim: Count
    layers: Count | None = None
    """The last decoder blocks whose layers count; None for all."""
    clusters: Count
    closeness: Literal["centre", "others"] = "centre"
    """To the centre of a pair's cluster, or of the others in it; then a pair alone in its cluster has none."""
    seed: int = 0
    micro_batch_pairs: Count
    """Pairs of one forward and backward in one process."""
    lora: LoraJob | None = None
    """The adapter that will be trained: its gradients are taken instead of the whole layers'."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations; features are float32."""
    gradient_checkpointing: bool = False
    beta: Positive
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    trust_remote_code: bool = False

    def reads(self) -> list[Path]:
        exact = self.dtype == "float32"
        return [self.pairs, *_weights(self.policy, exact), *_weights(self.reference, exact)]


class CanaryJob(Job):
    """Token sequences to score under a checkpoint as it would be served."""

    policy: Path
    dtype: Dtype = "float32"
    canary_ids: list[list[int]]
    trust_remote_code: bool = False

    def reads(self) -> list[Path]:
        return _weights(self.policy, masters=False)
