"""The one schema of the configuration: YAML files under configs/, overrides `a.b=c`, errors that name the key.

Relative paths start at the working directory.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import types
import typing
import zoneinfo
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from reward.dialects import Name as Dialect
from reward.settings import JudgeSettings, Rule
from selfplay.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: Path = Path("runs")
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run derives from this number."""


class PolicyConfig(Section):
    model: str
    """Checkpoint folder or Hub id of the initial policy."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "bfloat16"
    """Serving precision: of the engine, of exported checkpoints and of the canaries."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class PromptsConfig(Section):
    source: str
    """JSONL or Parquet file with `prompt` or `messages` (and optional `meta`), or a Hub dataset id."""
    split: str = "train"
    """Split of a Hub dataset."""
    column: str | None = None
    """Column of a Hub dataset that holds the prompt (a string or a list of messages)."""
    heldout: str | None = None
    """File of held-out prompts; without one a share of `source` is held out."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of `source` that is held out, by hash, when `heldout` is not set."""
    audit_fraction: Share = 0.4
    """Share of the held-out prompts kept apart as the audit set, which never gates."""
    per_round: Positive = 192
    """Prompts drawn in a round."""
    max_tokens: Positive = 256
    """Longest rendered prompt (tokens); longer ones are set aside and counted."""
    at_end: Literal["reshuffle", "stop"] = "reshuffle"
    """What happens when every prompt was drawn once."""
    leak_ngram: Positive = 8
    """Words of the n-grams by which a prompt that joins later is compared with held-out prompts."""
    leak_overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of n-grams in common from which on a prompt that joins later meets a held-out one, and is refused."""


class BreadthConfig(Section):
    method: Literal["none", "clusters"] = "none"
    """How a draw is compressed: not at all, or to representatives of clusters of its prompts' embeddings."""
    oversample: Annotated[float, Field(ge=1)] = 2.0
    """Prompts drawn for each one that is kept; those passed over count as drawn."""
    clusters: Positive | None = None
    """Clusters of a draw; by default one for each prompt that is kept, 1024 at most. Of fewer each keeps several."""
    embedding: Annotated[str, Field(min_length=1)] = "policy"
    """`policy`: its last hidden states; else the folder or Hub id of a sentence-transformers model."""
    pooling: Literal["mean", "last"] = "mean"
    """Of the policy's states: the mean over a prompt, or the last one, from which it answers: for a policy that has learned
    nothing about prompts, as one that was trained from scratch on answers alone."""


class EngineConfig(Section):
    max_model_len: Positive | None = None
    """Context of the engine (tokens); by default prompts.max_tokens + generate.max_tokens, with room for the canaries."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of the GPU's memory for vLLM (GPU only)."""
    tensor_parallel: Positive = 1
    """GPUs that one copy of the policy is split over."""
    max_num_seqs: Positive = 256
    """Sequences decoded at a time."""
    cpu_threads: Positive = 1
    """OpenMP threads of the engine (CPU only)."""
    cpu_kv_cache_gib: Positive = 1
    """Memory for the KV cache (GiB, CPU only)."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times a dead engine is started again within one call, with back-off."""
    silence: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a sign of progress after which the engine is taken for hung."""


class GenerateConfig(Section):
    candidates: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for a prompt (K)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; stored log-probabilities are those at temperature 1 whatever this is."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1 keeps every token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Tokens to sample from; 0 keeps every token."""
    max_tokens: Positive = 512
    """Longest response (tokens)."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a response; by default the end-of-sequence tokens of the policy's generation_config."""
    shard_prompts: Positive = 64
    """Prompts in a shard: the most that an interruption can lose."""
    engine: EngineConfig = EngineConfig()
    """The vLLM engine."""


# settings that say which reward, and not how it is asked: never inherited
WHICH = {
    "model", "heads", "trust_remote_code", "rules", "chat_judge", "url", "dialect", "tokenizer", "served_model", "api_key_env",
    "identity",
}  # fmt: skip
ACCESS = {"api_key_env", "concurrency", "timeout", "deadline"}  # has no part in what a source answers


class RewardSource(Section):
    """Where scores come from. What a member of an ensemble or a judge leaves out is as in the section `reward`."""

    model: str | None = None
    """Checkpoint folder or Hub id of a sequence-classification reward model, served by a child process."""
    heads: dict[str, float] = {}
    """Of a model with several labels, those that count, with their weights (docs/rewards.md)."""
    rules: list[Rule] = []
    """Python functions of the response, instead of `model`, served by a child process (docs/rewards.md)."""
    chat_judge: JudgeSettings | None = None
    """A language model behind a chat endpoint, instead of `model`, asked by a child process (docs/rewards.md)."""
    url: list[str] = []
    """Reward servers that run already, with the same model each; used instead of `model`."""
    dialect: Dialect = "selfplay"
    """What the servers of `url` speak: selfplay (`/score`), vllm-classify, vllm-pooling, openrlhf (`/get_reward`)."""
    tokenizer: str | None = None
    """Tokenizer folder whose chat template renders texts: the reward model's for vLLM, the policy's for openrlhf."""
    served_model: str | None = None
    """Name of the model at vLLM servers, where they have several."""
    api_key_env: str | None = None
    """Environment variable with the bearer token for the servers of `url`."""
    identity: str | None = None
    """A name that you vouch for where the servers of `url` tell none: scores are then kept in the cache. Give another one
    when the model behind the address changes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the served reward model."""
    device: str = "auto"
    """Device of the served reward model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the reward model."""
    batch: Positive = 64
    """Items in a request."""
    concurrency: Positive = 2
    """Requests in flight."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds before one request counts as failed."""
    deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of retries after which the reward counts as down and the stage fails."""

    def which(self) -> dict[str, Any]:
        """What decides which reward this is, as far as the configuration says it."""
        return self.model_dump(
            mode="json",
            include=(WHICH - ACCESS) | {"dtype"},
            exclude={"chat_judge": ACCESS},
            exclude_defaults=True,
        )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        for url in [*self.url, *(self.chat_judge.url if self.chat_judge else [])]:
            _require_plain(url)
        given = [name for name in ("model", "rules", "chat_judge", "url", "ensemble") if getattr(self, name, None)]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of `model`, `rules` or `chat_judge` (served by a child process), `url` (a server that "
                "runs) and, in reward and evaluate.judge, `ensemble` (several of them)"
            )
        for name, owner in (
            ("heads", "model"),
            ("trust_remote_code", "model"),
            ("tokenizer", "url"),
            ("served_model", "url"),
            ("api_key_env", "url"),
            ("identity", "url"),
        ):
            if getattr(self, name) and not getattr(self, owner):
                raise ValueError(f"`{name}` belongs to a `{owner}`")
        if self.dialect != "selfplay" and not self.url:
            raise ValueError(f"the dialect {self.dialect} needs a `url`: our own child speaks its own")
        if self.dialect.startswith("vllm") and not self.tokenizer:
            raise ValueError(
                f"the dialect {self.dialect} needs `tokenizer`, the folder of the reward model's tokenizer"
            )
        return self


def _require_plain(url: str) -> None:
    """Raise ValueError unless this is an address alone: it is shown in messages and kept in the ledger, secrets are not."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url.rpartition('@')[2]!r} is no address: one is like http://host:8100")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"the url of {parts.hostname} holds a user, a password, a query or a fragment: give the bare address, and a key "
            "in the environment variable that api_key_env names"
        )


class MemberConfig(RewardSource):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """Its name in reward_parts, logs and metrics; by default its place, from 0."""


class EnsembleConfig(Section):
    members: Annotated[list[MemberConfig], Field(min_length=2)]
    """The rewards that are combined. Each is brought to mean 0 and standard deviation 1 over the first round it scores,
    and keeps that scale."""
    combine: Literal["mean", "minimum", "mean_minus_std"] = "mean"
    """The ensemble's reward: the members' mean, their minimum, or mean − std_weight · standard deviation over members."""
    std_weight: Annotated[float, Field(ge=0)] = 1.0
    """λ of `mean_minus_std`."""

    @property
    def names(self) -> list[str]:
        return [member.name or str(i) for i, member in enumerate(self.members)]

    @model_validator(mode="after")
    def _own_names(self) -> EnsembleConfig:
        if twice := [n for n in self.names if self.names.count(n) > 1]:
            raise ValueError(f"two members are called {twice[0]!r}")
        return self


class ShapingConfig(Section):
    """What is taken off the external reward before pairs are made; each part is recorded in reward_parts."""

    length_control: Share = 0.0
    """Share of the reward's linear dependence on length that is taken out; the slope is the round's, within prompts."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off for each token beyond length_free."""
    length_free: Annotated[int, Field(ge=0)] = 0
    """Tokens that length_penalty leaves free."""
    repetition_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off, times the share of the response's n-grams of tokens that occurred in it before."""
    repetition_ngram: Positive = 4
    """Tokens of these n-grams."""
    cut_off_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off a response that hit the token limit; pairs.cut_off says whether such responses can be in a pair."""

    @property
    def active(self) -> bool:
        return any((self.length_control, self.length_penalty, self.repetition_penalty, self.cut_off_penalty))


class CacheConfig(Section):
    entries: Annotated[int, Field(ge=0)] = 1_000_000
    """Scores kept, the least recently used go first (about 100 bytes each); 0: no cache."""
    path: Path | None = None
    """SQLite file, which several runs may share; by default reward/scores.sqlite in the run folder."""


class RewardConfig(RewardSource):
    ensemble: EnsembleConfig | None = None
    """Several rewards as one, instead of `model` or `url`."""
    shaping: ShapingConfig = ShapingConfig()
    """Corrections for length, repetition and cut-off answers."""
    cache: CacheConfig = CacheConfig()
    """Scores that are not asked for twice, by content hash."""
    max_missing: Share = 0.05
    """Share of candidates that may have no score; past it the stage fails."""
    noise: Annotated[float, Field(ge=0)] = 1e-4
    """Explicit margins at or below this are the reward's own noise and make no pair."""


class Limits(Section):
    warn: Annotated[float, Field(ge=0)] | None = None
    """A value above this is a warning; null for none."""
    stop: Annotated[float, Field(ge=0)] | None = None
    """A value above this stops the round before it trains; null for never."""


class GuardConfig(Section):
    """When the reward is taken to go wrong. The values are metrics of every round, `guard/…`."""

    ties: Limits = Limits(warn=0.5)
    """Share of the pairs of a prompt's different answers whose rewards differ by no more than reward.noise."""
    saturation: Limits = Limits(warn=0.25)
    """Share of the rewards at the highest or at the lowest value of the round."""
    length_correlation: Limits = Limits(warn=0.6)
    """Correlation (either sign) of reward and length among the answers to a prompt."""
    shift: Limits = Limits(warn=0.3)
    """Kolmogorov-Smirnov distance of the round's rewards from those of the last `history` rounds."""
    disagreement: Limits = Limits(warn=0.5)
    """Mean over the candidates of the standard deviation over an ensemble's members (normalised scores)."""
    gold_drop: Limits = Limits(warn=0.05)
    """Fall of the gold score from its best of earlier rounds while the reward rose; where evaluate.gold is set. It has no
    `stop`: gold is reported and decides nothing."""
    probe_change: Limits = Limits(warn=0.01, stop=0.1)
    """Change of the score of a text that did not change, in standard deviations of the probes' first scores."""
    probe_missing: Limits = Limits(warn=0.1, stop=0.25)
    """Share of the texts that did not change which lost their score, or got one."""
    probes: Annotated[int, Field(ge=0)] = 16
    """Texts of the first round whose scores are asked for again, past the cache, before and after every round's; 0: none."""
    history: Positive = 3
    """Earlier rounds that a round is compared with."""

    @model_validator(mode="after")
    def _gold_decides_nothing(self) -> GuardConfig:
        if self.gold_drop.stop is not None:
            raise ValueError("gold_drop may warn and has no `stop`: gold is reported and never decides what is trained")
        return self


class PairsConfig(Section):
    selection: Literal["potential", "explicit", "implicit", "random"] = "potential"
    """What pairs are ranked by: alignment potential or one of its baselines."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the base pairs that is kept."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """w of the alignment potential: weight of the implicit margin."""
    implicit: Literal["simpo", "dpo"] = "simpo"
    """Implicit reward of a response: its mean log-probability (`simpo`), or β times its log-ratio to a reference that is
    not the policy that sampled it (`dpo`; costs a scoring pass of the reference over all candidates)."""
    signed: bool = False
    """Rank by the signed implicit margin instead of its absolute value."""
    max_disagreement: Annotated[float, Field(gt=0)] | None = None
    """A pair is dropped when the members of reward.ensemble disagree about one of its answers by more than this (standard
    deviation of their normalised scores); null for never."""
    cut_off: Literal["drop", "reject"] = "drop"
    """Responses that hit the token limit: in no pair, or only as the rejected one."""
    history: Annotated[int, Field(ge=0)] = 3
    """Earlier rounds whose pairs join the statistics when a round has fewer than 64 pairs."""


class DepthConfig(Section):
    method: Literal["none", "uniform", "gradient"] = "none"
    """Further pairs of the kept prompts: none, the same number for every prompt, or (`gradient`, BPO) the more the closer
    the gradient of a prompt's base pair is to the centre of its cluster of gradients. For these gradients each process of
    the trainer holds the whole policy, in bf16 with train.bf16."""
    pairs_per_prompt: Annotated[float, Field(ge=1)] = 2.0
    """Budget of `uniform` and `gradient`: pairs trained on, the base pairs included, for each kept prompt on average."""
    dim: Positive = 1024
    """Dimensions that gradients are projected to (`gradient`). A number with divisors near its root is cheapest."""
    layers: Positive | None = None
    """The last decoder blocks whose gradients count (`gradient`); by default all. Fewer take less time and memory."""
    clusters: Positive | None = None
    """Clusters of gradients (`gradient`); by default the square root of the number of kept pairs."""
    closeness: Literal["centre", "others"] = "centre"
    """What a gradient is compared with (`gradient`): the centre of its cluster, or that of the others in its cluster. Where
    gradients are nearly orthogonal the first mostly says how small the cluster is, since each is a part of its centre."""


class EvolveConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Rounds between rewrites of prompts, whose results join the pool; 0: never."""
    top: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a round's prompts that are rewritten: those of the highest alignment potential."""
    max_ratio: Annotated[float, Field(ge=1)] = 5.0
    """Longest of a prompt and its rewrite over the shorter one (characters)."""
    rewriter: Annotated[str, Field(pattern=r"^(policy|[\w.]+:\w+)$")] = "policy"
    """Who rewrites: the policy, or a function `module:function` of (messages, strategy, seed) that returns a text."""


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
    reference: Literal["previous", "initial"] | EveryN = "previous"
    """The reference: the policy that sampled the round, the initial one, or one refreshed `every: n` rounds."""
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
    accelerate: Path | None = None
    """Configuration file for `accelerate launch` (processes, FSDP); without one the trainer is a single plain process."""
    cpu_threads: Positive = 1
    """Threads of the trainer (CPU only)."""
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


class GateConfig(Section):
    win_rate_lower: Share = 0.47
    """A candidate is not inferior when the lower bound of its win rate is above this; 0 asks nothing."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Two-sided confidence of the bootstrap interval."""
    reward_up: bool = True
    """Demand a higher mean reward than the champion's on the same prompts."""
    max_kl: Annotated[float, Field(gt=0)] = 30.0
    """Limit of KL(candidate ‖ current), nats an answer; estimated from sampled answers, so it wants temperature 1."""
    max_length_ratio: Annotated[float, Field(gt=1)] = 1.5
    """Limit of the mean answer length over the champion's; its inverse is the lower limit."""
    max_cut_off: Share = 0.1
    """Limit of the share of answers that hit the token limit, unless the champion's share is as high."""


class JudgeConfig(RewardSource):
    ensemble: EnsembleConfig | None = None
    """Several rewards as one judge, instead of `model` or `url`; their scale is fixed on the first answers it judges."""


class EvaluateConfig(Section):
    prompts: Positive = 128
    """Held-out prompts answered by candidate and champion, drawn anew each round."""
    judge: JudgeConfig | None = None
    """Another reward than the one that trains; without one the gate is not independent, and says so."""
    gold: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function` of a rubric (messages, response, meta) → scores with `total`; reported, never gates."""
    audit_every: Annotated[int, Field(ge=0)] = 4
    """Rounds between comparisons with the initial policy on the audit set; 0: never."""
    audit_prompts: Positive = 256
    """Prompts of the audit set that are used."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap samples."""
    gate: GateConfig = GateConfig()
    """When a candidate becomes the current policy."""


class SwapConfig(Section):
    canaries: Annotated[int, Field(ge=1)] = 8
    """Short fixed sequences whose log-probabilities show which weights are in the engine."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest |engine − checkpoint| (nats a token); by default 1e-4 in fp32, 2e-2 below."""


class PlacementConfig(Section):
    colocated: bool = False
    """Generator and trainer share their GPUs: the engine sleeps while the trainer works."""
    generator: list[int] | None = None
    """GPUs of the generator; by default all that are visible."""
    trainer: list[int] | None = None
    """GPUs of the trainer; by default all that are visible."""
    reward: list[int] | None = None
    """GPUs of the reward server; by default all that are visible."""


class RetentionConfig(Section):
    last: Annotated[int, Field(ge=0)] = 3
    """The newest policies whose weights are kept, beside current, its parent, the initial one and the reference."""
    every: Annotated[int, Field(ge=0)] = 0
    """Every n-th policy is kept too; 0: none."""
    pinned: list[int] = []
    """Policies that are always kept."""
    rejected_rounds: Annotated[int, Field(ge=0)] = 2
    """Rounds after which the weights of a rejected policy go."""


class EndConfig(Section):
    rounds: Positive | None = None
    """Stop when the run has so many rounds."""
    date: AwareDatetime | None = None
    """Start no round after this moment (ISO 8601 with an offset)."""
    reward: float | None = None
    """Stop when the current policy's mean held-out reward reaches this."""
    tokens: Positive | None = None
    """Budget of sampled tokens, over all rounds: candidates, rewrites, and answers to held-out prompts."""
    device_hours: Annotated[float, Field(gt=0)] | None = None
    """Budget of hours in finished stages, times the devices that work: the GPUs of `placement`, all that are visible where
    a role has none of its own there, 1 without any."""


class ScheduleConfig(Section):
    mode: Literal["continuous", "interval", "cron"] = "continuous"
    """A round follows a round; or one every so many minutes; or at the times of a cron line."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes from the start of a round to that of the next (`interval`)."""
    cron: str | None = None
    """Five fields: minute, hour, day, month, weekday (`cron`)."""
    time_zone: str = "UTC"
    """Of the cron line and of the quiet hours (an IANA name)."""
    jitter_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Each start is put off by a random time up to this."""
    quiet_hours: list[Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]] = []
    """Times of day («22:00-06:30») in which no round starts."""
    missed: Literal["skip", "once"] = "once"
    """Rounds that fell due while the service was down or paused: forgotten, or made up for by a single one."""
    end: EndConfig = EndConfig()
    """When the service stops starting rounds."""

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.mode == "interval") != (self.every_minutes is not None):
            raise ValueError("every_minutes goes with mode: interval, and only with it")
        if (self.mode == "cron") != (self.cron is not None):
            raise ValueError("cron goes with mode: cron, and only with it")
        if self.cron is not None and len(self.cron.split()) != 5:
            raise ValueError(f"cron {self.cron!r} has not five fields (minute hour day month weekday)")
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone {self.time_zone!r} is no IANA time zone, such as Europe/Paris") from None
        quiet: set[int] = set()
        for window in self.quiet_hours:
            begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in window.split("-"))
            if begin == end:
                raise ValueError(f"quiet_hours {window!r} is empty: it ends when it begins")
            quiet |= {minute % 1440 for minute in range(begin, end if end > begin else end + 1440)}
        if len(quiet) == 1440:
            raise ValueError("quiet_hours cover the whole day: no round would ever start")
        return self


class ServiceConfig(Section):
    host: str = "127.0.0.1"
    """Address of API and page; any but a loopback address demands a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    """Port of API and page; 0 takes a free one."""
    hosts: list[str] = []
    """Further names that the page is reached by, such as that of a reverse proxy; addresses and localhost always are."""
    token_env: str = "SELFPLAY_TOKEN"
    """Environment variable with the bearer token. The token itself never stands in a configuration."""
    token_file: Path | None = None
    """File with the bearer token, instead of the variable."""
    drain_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time that a shard, or the save of the trainer, gets to finish on SIGTERM; then it is cut."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a failed stage is tried again, with back-off, before the service pauses itself."""
    retry_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds before the first retry; each further one waits twice as long."""
    stall_hours: Annotated[float, Field(gt=0)] = 6.0
    """Hours in which neither a stage gets on nor a process of the service says a word, after which these are ended and what
    they did is tried again; never less than the `silence` of engine and trainer, which end one that hangs much sooner. A
    download is silent: more where a model or a data set takes longer."""
    pause_after_rejected: Positive = 3
    """Rejected rounds in a row after which the service pauses itself."""
    webhook_env: str = "SELFPLAY_WEBHOOK"
    """Environment variable with the URL that alerts are posted to as JSON; unset: none."""


class Config(Section):
    run: RunConfig = RunConfig()
    """Name, folder and seed."""
    policy: PolicyConfig
    """The model that is aligned."""
    prompts: PromptsConfig
    """Where prompts come from."""
    breadth: BreadthConfig = BreadthConfig()
    """Fewer prompts that stand for many."""
    generate: GenerateConfig = GenerateConfig()
    """Sampling of candidates."""
    reward: RewardConfig
    """The external reward."""
    guard: GuardConfig = GuardConfig()
    """When the reward is taken to go wrong."""
    pairs: PairsConfig = PairsConfig()
    """From scored candidates to preference pairs."""
    evolve: EvolveConfig = EvolveConfig()
    """New prompts from those worth most."""
    depth: DepthConfig = DepthConfig()
    """Further pairs for the kept prompts."""
    train: TrainConfig = TrainConfig()
    """ε-DPO."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation and gate."""
    swap: SwapConfig = SwapConfig()
    """Verification of new weights in the engine."""
    placement: PlacementConfig = PlacementConfig()
    """Which GPUs do what."""
    retention: RetentionConfig = RetentionConfig()
    """Which weights stay on disk."""
    track: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Where round and trainer metrics go beside the ledger."""
    schedule: ScheduleConfig = ScheduleConfig()
    """When rounds start (`selfplay serve`)."""
    service: ServiceConfig = ServiceConfig()
    """The long-running service (`selfplay serve`)."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Config:
        longest = self.prompts.max_tokens + self.generate.max_tokens
        if longest > self.train.max_length:
            raise ValueError(
                f"prompts.max_tokens + generate.max_tokens = {longest} is more than train.max_length = "
                f"{self.train.max_length}: training never truncates; lower the first two or raise the last"
            )
        context = self.generate.engine.max_model_len
        if context is not None and longest + 1 > context:
            raise ValueError(
                f"prompts.max_tokens + generate.max_tokens + 1 = {longest + 1} is more than generate.engine.max_model_len = {context}"
            )
        return self

    @model_validator(mode="after")
    def _implicit_has_a_reference(self) -> Config:
        if self.pairs.implicit == "dpo" and (
            self.train.reference == "previous" or self.train.reference == EveryN(every=1)
        ):
            raise ValueError(
                "pairs.implicit = dpo with train.reference = previous: the reference is the policy that samples, so every "
                "implicit reward is 0; set train.reference to initial or {every: n}, or pairs.implicit to simpo"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> Config:
        if self.pairs.max_disagreement is not None and self.reward.ensemble is None:
            raise ValueError("pairs.max_disagreement goes with reward.ensemble: a single reward cannot disagree")
        trained_on = list(self.reward_sources().values())
        if same := [key for key, s in self.judge_sources().items() if any(_is_same(s, t) for t in trained_on)]:
            raise ValueError(f"{same[0]} is a reward that trains: a judge is another one; leave evaluate.judge out")
        if self.reward.shaping.cut_off_penalty and self.pairs.cut_off == "drop":
            raise ValueError(
                "reward.shaping.cut_off_penalty goes with pairs.cut_off: reject; otherwise nothing reads it"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    def reward_sources(self) -> dict[str, RewardSource]:
        """What scores for training, by the key of the configuration that names it."""
        return _sources("reward", self.reward, self.reward)

    def judge_sources(self) -> dict[str, RewardSource]:
        """What judges at the gate, in the same way; empty where that is the reward that trains."""
        judge = self.evaluate.judge
        return {} if judge is None else _sources("evaluate.judge", judge, self.reward)

    def fixed(self) -> dict[str, Any]:
        """What cannot change within a run folder: policy, data split, seed."""
        return {
            "policy.model": self.policy.model,
            "policy.revision": self.policy.revision,
            "policy.dtype": self.policy.dtype,
            **{
                f"prompts.{name}": getattr(self.prompts, name)
                for name in ("source", "split", "column", "heldout", "heldout_fraction", "audit_fraction", "max_tokens")
            },
            "run.seed": self.run.seed,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _is_same(a: RewardSource, b: RewardSource) -> bool:
    """Whether two sources are one reward, in whatever precision or place."""
    if a.url or b.url:
        return (
            not {u.rstrip("/") for u in a.url}.isdisjoint(u.rstrip("/") for u in b.url)
            and a.served_model == b.served_model
        )
    differ = {"dtype", "trust_remote_code"}
    return {k: v for k, v in a.which().items() if k not in differ} == {
        k: v for k, v in b.which().items() if k not in differ
    }


def _sources(key: str, section: RewardConfig | JudgeConfig, defaults: RewardConfig) -> dict[str, RewardSource]:
    """One source, or those of an ensemble; what they leave out is as in `section`, then as in `defaults`."""
    shared = set(RewardSource.model_fields) - WHICH
    inherited = defaults.model_dump(include=shared) | section.model_dump(include=shared, exclude_unset=True)
    where = set(RewardSource.model_fields)
    if section.ensemble is None:
        return {key: RewardSource.model_validate(inherited | section.model_dump(include=WHICH))}
    return {
        f"{key}.ensemble.members.{i}": RewardSource.model_validate(
            inherited | member.model_dump(include=where, exclude_unset=True)
        )
        for i, member in enumerate(section.ensemble.members)
    }


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply overrides `a.b=c` (values are YAML) and validate. Raises ConfigError."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", "give a YAML file, configs/tiny.yaml for one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping of sections", "see configs/tiny.yaml for the form")
    for override in overrides:
        _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: not of the form a.b=c")
    *parents, last = key.split(".")
    for name in parents:
        below = data.setdefault(name, {})
        if below is None:
            below = data[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        data = below
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None


def _describe(error: Any) -> str:
    """One validation error as «path: what»; an unknown key gets the nearest valid name."""
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc) or "configuration"
    if error["type"] == "extra_forbidden":
        names = _fields(Config, loc[:-1])
        near = difflib.get_close_matches(loc[-1], names, n=1, cutoff=0.5)
        return f"{where}: unknown key" + (
            f", did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"; known: {', '.join(names)}"
        )
    if error["type"] == "missing":
        return f"{where}: required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f" (got {error['input']!r})" if error["type"] != "value_error" else "")


def _fields(section: type[BaseModel], loc: list[str]) -> list[str]:
    for part in loc:
        if part not in section.model_fields:
            continue  # the name of a union member, which pydantic puts into the path
        annotation = section.model_fields[part].annotation
        members = (
            typing.get_args(annotation)
            if typing.get_origin(annotation) in (typing.Union, types.UnionType)
            else (annotation,)
        )
        section = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), section)
    return list(section.model_fields)
