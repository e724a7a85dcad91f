"""The section `reward`: where scores come from, how several become one, their corrections, and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from reward.dialects import Name as Dialect
from reward.settings import JudgeSettings, Rule
from selfplay.config.base import Positive, Section, Share

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
