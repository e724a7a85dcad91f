"""The section `reward`: where scores come from, how several become one, their corrections, and the cache."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from reward import kinds
from reward.dialects import Name as Dialect
from reward.kinds import Kind
from reward.settings import Address, JudgeSettings, Rule, RulesSettings, Variables
from selfplay.config.base import Positive, Section, Share

# settings that say which reward, and not how it is asked: never inherited
WHICH = {
    "model", "heads", "trust_remote_code", "rules", "chat_judge", "source", "url", "dialect", "tokenizer", "served_model", "api_key_env",
    "proxy_env", "identity", "chat_template_kwargs",
}  # fmt: skip
ACCESS = {"api_key_env", "proxy_env", "concurrency", "timeout", "deadline"}  # has no part in what a source answers


class RewardSource(Section):
    """Where scores come from. What a member of an ensemble or a judge leaves out is as in the section `reward`."""

    model: str | None = None
    """Checkpoint folder or Hub id of a sequence-classification reward model, served by a child process."""
    heads: dict[str, float] = {}
    """The labels that count, with their weights, for a model with several labels (docs/rewards.md)."""
    rules: list[Rule] = []
    """Python functions of the response, instead of `model`, served by a child process (docs/rewards.md)."""
    chat_judge: JudgeSettings | None = None
    """A language model behind a chat endpoint, instead of `model`, asked by a child process (docs/rewards.md)."""
    source: dict[str, Any] | None = None
    """Any kind of reward, instead of `model`: `{kind: NAME, …}` with the settings of that kind, served by a child process
    (docs/rewards.md). A kind of your own is named by its place, `module:Class`."""
    url: list[Address] = []
    """Reward servers that run already, instead of `model`. All of them have the same model."""
    dialect: Dialect = "selfplay"
    """What the servers of `url` speak: selfplay (`/score`), vllm-classify, vllm-pooling, openrlhf (`/get_reward`)."""
    tokenizer: str | None = None
    """Folder of the tokenizer whose chat template renders texts. For vLLM it is the reward model's, and for openrlhf
    the policy's."""
    chat_template_kwargs: Variables = {}
    """Variables for the chat template of `model` or `tokenizer`, such as {enable_thinking: false}. A `chat_judge` has its
    own."""
    template_date: date | None = None
    """The date that this chat template prints, if it prints one. The default is the day on which the run began."""
    served_model: str | None = None
    """Name of the model at vLLM servers, where they have several."""
    api_key_env: str | None = None
    """Environment variable with the bearer token for the servers of `url`."""
    proxy_env: str | None = None
    """Environment variable with the address of the HTTP proxy before the servers of `url`, such as HTTPS_PROXY. By
    default no proxy is used."""
    identity: str | None = None
    """A name for the model behind `url`, for servers that do not name it. With a name, scores are kept in the cache.
    You vouch for it: give another name when the model behind the address changes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the served reward model."""
    device: str = "auto"
    """Device of the served reward model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the reward model."""
    batch: Positive = 64
    """Items in a request."""
    concurrency: Positive | None = None
    """Requests in flight. The default is two for each server of `url`, or two for each GPU on which our own server has
    a copy."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds before one request counts as failed."""
    deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of retries after which the reward counts as down and the stage fails."""

    def served(self) -> tuple[str, Kind] | None:
        """The name of the kind that a child process serves, and its settings; None for servers that run already."""
        if self.model:
            fields = {
                "model", "heads", "dtype", "device", "trust_remote_code", "chat_template_kwargs", "template_date",
            }  # fmt: skip
            return "model", kinds.read("model", self.model_dump(include=fields))
        if self.rules:
            return "rules", RulesSettings(rules=self.rules)
        if self.chat_judge:
            return "judge", self.chat_judge
        return self._kind(self.source) if self.source else None

    def dated(self, today: date) -> RewardSource:
        """The same source, whose chat template prints this date unless the configuration gives another one."""
        return self if self.template_date else self.model_copy(update={"template_date": today})

    def plain(self) -> RewardSource:
        """The same source without `source`, where the fields beside it can say the same. Elsewhere it is this one."""
        if self.source is None:
            return self
        name, settings = _split(self.source)
        fields = {"model": settings, "rules": settings, "judge": {"chat_judge": settings}}.get(
            name, {"source": settings}
        )
        if "source" in fields or not fields.keys() <= RewardSource.model_fields.keys():
            return self
        own = self.model_dump(include=set(RewardSource.model_fields) - {"source"}, exclude_unset=True)
        return RewardSource.model_validate(own | fields)

    def which(self) -> dict[str, Any]:
        """What decides which reward this is, as far as the configuration says it."""
        plain = self.plain()
        if plain.source is not None:
            name, settings = self._kind(plain.source)
            return {"source": {"kind": name, **settings.which()}}
        return plain.model_dump(
            mode="json",
            include=(WHICH - ACCESS) | {"dtype"},
            exclude={"chat_judge": ACCESS},
            exclude_defaults=True,
        )

    def _kind(self, source: dict[str, Any]) -> tuple[str, Kind]:
        """The kind that a `source` names, and its settings: precision, device and date as beside it where it leaves them out."""
        name, settings = _split(source)
        beside = {"dtype": self.dtype, "device": self.device, "template_date": self.template_date}
        known = kinds.find(name).model_fields
        return name, kinds.read(name, {k: v for k, v in beside.items() if k in known} | settings)

    @field_validator("source")
    @classmethod
    def _kind_reads_it(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        if given is not None:
            if not isinstance(given.get("kind"), str):
                raise ValueError(f"`kind` is required: {', '.join(kinds.KINDS)}, or a kind of your own as module:Class")
            kinds.read(*_split(given))
        return given

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        choices = ("model", "rules", "chat_judge", "source", "url", "ensemble")
        if len([name for name in choices if getattr(self, name, None)]) != 1:
            raise ValueError(
                "give exactly one of `model`, `rules`, `chat_judge` or `source` (served by a child process), `url` (a server "
                "that runs) and, in reward and evaluate.judge, `ensemble` (several of them)"
            )
        for name, owner in (
            ("heads", "model"),
            ("trust_remote_code", "model"),
            ("tokenizer", "url"),
            ("served_model", "url"),
            ("api_key_env", "url"),
            ("proxy_env", "url"),
            ("identity", "url"),
        ):
            if getattr(self, name) and not getattr(self, owner):
                raise ValueError(f"`{name}` belongs to a `{owner}`")
        if self.chat_template_kwargs and not (self.model or self.tokenizer):
            raise ValueError(
                "`chat_template_kwargs` belongs to a `model` or a `tokenizer`: other rewards have no chat template here"
            )
        if self.dialect != "selfplay" and not self.url:
            raise ValueError(f"the dialect {self.dialect} needs a `url`: our own child speaks its own")
        if self.dialect.startswith("vllm") and not self.tokenizer:
            raise ValueError(
                f"the dialect {self.dialect} needs `tokenizer`, the folder of the reward model's tokenizer"
            )
        return self


def _split(source: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind that a `source` names, and the settings beside it."""
    settings = dict(source)
    return settings.pop("kind"), settings


class MemberConfig(RewardSource):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """Its name in reward_parts, logs and metrics. The default is its place in the list, from 0."""


class EnsembleConfig(Section):
    members: Annotated[list[MemberConfig], Field(min_length=2)]
    """The rewards that are combined. Each is brought to mean 0 and standard deviation 1 over the first round it scores,
    and keeps that scale."""
    combine: Literal["mean", "minimum", "mean_minus_std"] = "mean"
    """How the members' scores become one reward: their mean, their minimum, or their mean less std_weight times their
    standard deviation."""
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


class JudgeConfig(RewardSource):
    ensemble: EnsembleConfig | None = None
    """Several rewards as one judge, instead of `model` or `url`. Their scale is fixed on the first answers that it
    judges."""


class ShapingConfig(Section):
    """What is taken off the external reward before pairs are made; each part is recorded in reward_parts."""

    length_control: Share = 0.0
    """Share of the reward's linear dependence on length that is taken out. The slope is fitted to the round's answers,
    within each prompt."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off for each token beyond length_free."""
    length_free: Annotated[int, Field(ge=0)] = 0
    """Tokens that length_penalty leaves free."""
    repetition_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off for repetition: this number times the share of the response's n-grams of tokens that occurred in
    it before."""
    repetition_ngram: Positive = 4
    """Tokens of these n-grams."""
    repetition_beyond_length: bool = False
    """Whether only repetition beyond that of answers of the same length counts. Otherwise the shortest of answers with
    equal rewards is chosen, and the longest rejected."""
    cut_off_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Reward taken off a response that hit the token limit. pairs.cut_off says whether such a response can be in a
    pair."""

    @property
    def active(self) -> bool:
        return any((self.length_control, self.length_penalty, self.repetition_penalty, self.cut_off_penalty))


class CacheConfig(Section):
    entries: Annotated[int, Field(ge=0)] = 1_000_000
    """Scores that are kept, about 100 bytes each. The least recently used ones go first. 0: there is no cache."""
    path: Path | None = None
    """SQLite file, which several runs may share. The default is reward/scores.sqlite in the run folder."""


class RewardConfig(RewardSource):
    ensemble: EnsembleConfig | None = None
    """Several rewards as one, instead of `model` or `url`."""
    shaping: ShapingConfig = ShapingConfig()
    """Corrections for length, repetition and cut-off answers."""
    cache: CacheConfig = CacheConfig()
    """Scores that are not asked for twice, by content hash."""
    max_missing: Share = 0.05
    """Share of the candidates that may have no score. If more have none, the stage fails."""
    noise: Annotated[float, Field(ge=0)] = 1e-4
    """An explicit margin up to this is noise of the reward, and makes no pair."""
