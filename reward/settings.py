"""Settings of models, rules and judges, as they stand in a configuration or in a YAML file for the server."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from reward.kinds import Kind
from reward.scorer import Scorer


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Rule(_Settings):
    weight: float = 1.0
    """Factor of the value of this rule. The reward is the sum over all rules."""


class _Reference(_Rule):
    references: str | None = None
    """JSONL file with `prompt` (the last user message) and `reference`. A reference that comes with the item takes
    precedence."""
    pattern: str | None = None
    """Regular expression that finds the answer: the first group of its last match. By default the answer is the whole
    response (`exact`), or the last \\boxed{}, or else the last number (`numeric`)."""


class Length(_Rule):
    """1 for a length from `min` to `max`. Above `max` it falls evenly, to 0 at twice `max`. Below `min` it falls
    evenly, to 0 for an empty response."""

    rule: Literal["length"]
    unit: Literal["words", "characters"] = "words"
    """What is counted."""
    min: Annotated[int, Field(ge=0)] = 0
    """Least length with the full value."""
    max: Annotated[int, Field(ge=1)] | None = None
    """Greatest length with the full value."""


class Format(_Rule):
    """1 if the response consists of `<tag>…</tag>` for each of `tags`, in this order, each once, and of nothing else.
    Otherwise 0."""

    rule: Literal["format"]
    tags: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z_][\w-]*$")]], Field(min_length=1)]
    """Such as [think, answer]."""


class Regex(_Rule):
    """1 if `pattern` is found in the response, otherwise 0. With `absent` it is the other way round."""

    rule: Literal["regex"]
    pattern: str
    """Regular expression of the `regex` package; `^` and `$` are the ends of the response."""
    absent: bool = False
    """Reward responses in which it is not found."""


class Exact(_Reference):
    """1 if the answer is the reference, otherwise 0. White space does not count."""

    rule: Literal["exact"]
    ignore_case: bool = False
    """Whether capitals and small letters count as the same."""


class Numeric(_Reference):
    """1 if the number in the response is that of the reference, otherwise 0."""

    rule: Literal["numeric"]
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """Difference that still counts as equal, relative to the greater of 1 and the reference."""


class Json(_Rule):
    """1 if the response is one JSON value, otherwise 0."""

    rule: Literal["json"]
    fenced: bool = True
    """For a response that is a ```json block, what is in the block counts."""
    keys: list[str] = []
    """Keys that the value must have, as an object."""


class Function(_Rule):
    """The number that `function(messages, response, reference, **options)` returns. `messages` is a list of dicts."""

    rule: Literal["function"]
    function: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
    """`module:function`, imported by the server. An item for which it raises, or returns no finite number, has no score."""
    options: dict[str, Any] = {}
    """Further arguments."""


Rule = Annotated[Length | Format | Regex | Exact | Numeric | Json | Function, Field(discriminator="rule")]


def require_plain(url: str) -> str:
    """The address, which is shown in messages and stored. Raises ValueError for one that may hold a secret, or is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url.rpartition('@')[2]!r} is no address: one is like http://host:8100")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            f"the url of {parts.hostname} holds a user, a password, a query or a fragment: give the bare address, and a key "
            "in the environment variable that api_key_env names"
        )
    return url


Address = Annotated[str, AfterValidator(require_plain)]

OURS = frozenset(
    {
        "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
        "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "strftime_now",
    }
)  # fmt: skip
"""Arguments of `apply_chat_template` that decide on more than the text, and so are not for a configuration."""


def require_variables(given: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Variables for a chat template. Raises ValueError for a name that is no variable of a template."""
    if taken := sorted(OURS & given.keys()):
        hint = ": the date that it prints is `template_date`" if taken == ["strftime_now"] else ""
        raise ValueError(f"{', '.join(taken)} cannot be given to a chat template{hint}")
    return given


Variables = Annotated[dict[str, JsonValue], AfterValidator(require_variables)]
"""What a chat template is given beside the conversation, such as {enable_thinking: false}."""


def with_date(variables: Mapping[str, Any], today: date) -> dict[str, Any]:
    """The variables, and the date that a template prints for today: it asks for it by `strftime_now`."""
    return {**variables, "strftime_now": datetime.combine(today, time()).strftime}


class ModelSettings(Kind):
    # the date: where the template prints one, it is part of what the server says of the template
    access: ClassVar[frozenset[str]] = frozenset({"device", "batch_tokens", "template_date"})
    model: str
    """Folder of a sequence classification model, or its name on the Hub."""
    heads: dict[str, float] = {}
    """The labels that count, with their weights, for a model with several labels."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision. `auto` is that of the checkpoint."""
    device: str = "auto"
    """`auto`, `cpu` or one GPU such as `cuda:1`. With several, such as `cuda:0,cuda:1`, or with `all`, each gets a copy
    of the model."""
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one forward pass. The default is 1024 on a CPU and 16384 on a GPU."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that a conversation may have. A longer one gets no score. The default is the limit of the model."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_kwargs: Variables = {}
    """Variables for the model's chat template, such as {enable_thinking: false}."""
    template_date: date | None = None
    """The date that its chat template prints, if it prints one. The default is the day on which the model is loaded."""

    def scorers(self) -> Sequence[Scorer]:
        from transformers.utils import logging

        from reward.models import load_all

        logging.disable_progress_bar()
        options = self.model_dump(exclude={"model", "device"})
        return load_all(self.model, devices=self.device, **options)


class RulesSettings(Kind):
    rules: list[Rule]
    """The reward is the sum of weight × value over them."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        """A list alone is the list of rules."""
        return {"rules": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _some(self) -> "RulesSettings":
        if not self.rules:
            raise ValueError("no rule is given")
        return self

    def scorers(self) -> Sequence[Scorer]:
        from reward.rules import Rules

        return [Rules(self.rules)]


class JudgeSettings(Kind):
    access: ClassVar[frozenset[str]] = frozenset({"concurrency", "timeout", "deadline", "api_key_env", "proxy_env"})
    url: list[Address]
    """OpenAI-compatible servers, without `/v1`."""
    model: str
    """Name of the model there."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """`pointwise`: the judge gives each response a number. `pairwise`: the judge compares each response with its
    reference. If it has none, it is compared with other responses to the same messages in the same request. The reward
    is the share of comparisons that it wins, and a tie is half a win."""
    rubric: str = "Judge how helpful, correct, clear and honest it is. Longer is not better."
    """What the judge looks at."""
    lowest: float = 1.0
    """Worst number of a pointwise judge."""
    highest: float = 10.0
    """Best number of a pointwise judge."""
    references: bool = True
    """In pairwise mode, compare a response with its reference if it has one. Turn this off for references that are
    tests or constraints instead of answers."""
    opponents: Annotated[int, Field(ge=1)] = 3
    """In pairwise mode, how many other responses each one without a reference is compared with. Each comparison is
    asked in both orders."""
    max_tokens: Annotated[int, Field(ge=1)] = 512
    """Most tokens of the judge's reply."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature of the judge. With 0 it gives the same verdict each time, as far as its server can."""
    concurrency: Annotated[int, Field(ge=1)] = 8
    """Requests in flight."""
    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds of one request."""
    deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds of one request with all its repetitions. After that there is no score, and whoever asked is told so."""
    api_key_env: str | None = None
    """Environment variable with the bearer token."""
    proxy_env: str | None = None
    """Environment variable with the address of the HTTP proxy on the way, such as HTTPS_PROXY. By default no proxy is
    used."""
    control_tokens: list[str] = []
    """Further texts that structure a conversation for this judge. Inside the texts that it judges they are broken up.
    Texts of the usual forms (`<|…|>`, `[INST]`, `</s>`, `<start_of_turn>`) always are."""
    chat_template_kwargs: Variables = {}
    """Variables for the judge's own chat template, such as {enable_thinking: false}. vLLM and SGLang take them."""
    extra: dict[str, Any] = {}
    """Further keys of each request, such as {seed: 0} or vLLM's structured_outputs."""

    @model_validator(mode="after")
    def _range(self) -> "JudgeSettings":
        if not self.url or not self.lowest < self.highest:
            raise ValueError("a judge needs a url, and lowest below highest")
        return self

    def scorers(self) -> Sequence[Scorer]:
        from reward.judge import Judge

        return [Judge(self)]
