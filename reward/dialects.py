"""The wire formats that the client speaks: how items become a request, and an answer becomes scores.

    selfplay       POST /score       items with ids, which are returned, so that an answer in another order is noticed
    vllm-classify  POST /classify    token ids to a vLLM pooling server; raw scores, without an activation
    vllm-pooling   POST /pooling     the same by vLLM's other route
    openrlhf       POST /get_reward  texts: prompt, and prompt with response

A dialect has no connection and keeps no state. It turns items into bytes and bytes into scores.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from math import isfinite
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from reward import hub
from reward.faults import Fault
from reward.schema import GetRewardResponse, Health, Item, ScoreResponse

Name = Literal["selfplay", "vllm-classify", "vllm-pooling", "openrlhf"]
Answer = TypeVar("Answer", bound=BaseModel)

NOT_UNICODE = "text that is not valid Unicode (a lone surrogate)"
UNLIMITED = 10**9  # tokenizers without a limit say 10**30
DEFAULT_MAX_TOKENS = 32768


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An item of a request: its place in the caller's list, its id, and its JSON in one piece or several."""

    place: int
    id: str
    parts: tuple[bytes, ...]
    group: int
    """Items that follow each other with the same messages have the same number."""

    @property
    def size(self) -> int:
        return sum(map(len, self.parts)) + len(self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What became of one item. `weights` names what scored it, if the server says so. `named`: whether the answer names
    the item by its id."""

    place: int
    score: float | None
    reason: str | None
    weights: str | None = None
    named: bool = False


class Dialect(Protocol):
    """One wire format."""

    @property
    def path(self) -> str: ...

    @property
    def too_large(self) -> frozenset[int]:
        """HTTP statuses after which a request is split. A single item that still gets one is set aside."""

    @property
    def health_path(self) -> str | None:
        """Where the service says what it serves; None if it says nothing."""

    def parts(self, items: Sequence[Item]) -> list[tuple[bytes, ...] | str]:
        """Each item's JSON, or why it cannot be asked for."""

    def request(self, chunk: Sequence[Entry]) -> bytes: ...

    def read(self, content: bytes, chunk: Sequence[Entry]) -> list[Scored]:
        """The scores in an answer to `chunk`. Raises Fault unless it is certain which item has which score."""

    def health(self, content: bytes, url: str) -> Health: ...


class Selfplay:
    """The format of reward/server.py."""

    path, health_path = "/score", "/healthz"
    too_large = frozenset({413})

    def parts(self, items: Sequence[Item]) -> list[tuple[bytes, ...] | str]:
        found: list[tuple[bytes, ...] | str] = []
        for item in items:
            try:
                found.append((to_json(item, exclude_none=True),))
            except PydanticSerializationError:
                found.append(NOT_UNICODE)
        return found

    def request(self, chunk: Sequence[Entry]) -> bytes:
        return b'{"items":[' + b",".join(entry.parts[0] for entry in chunk) + b"]}"

    def read(self, content: bytes, chunk: Sequence[Entry]) -> list[Scored]:
        given = _parse(content, ScoreResponse)
        # the format says that a server without ids keeps the order
        if given.ids is not None and given.ids != [entry.id for entry in chunk]:
            raise Fault("the scores belong to other items, or are in another order")
        return _scored(given.scores, given.errors, chunk, given.weights_sha256, named=given.ids is not None)

    def health(self, content: bytes, url: str) -> Health:
        return _parse(content, Health)


class _Numbers(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    index: int
    probs: list[float] | None = None
    data: list[float] | None = None


class _NumbersResponse(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    data: list[_Numbers]


class Vllm:
    """vLLM's pooling server. Texts are rendered and tokenised here, so that control tokens in them are split.

    `tokenizer` is the folder or the Hub name of the reward model's tokenizer, which has a chat template. Nothing imports
    torch. `variables`, `today`: see ChatEncoder. Raises ValueError for a tokenizer that cannot be used.
    """

    # vLLM answers 400 to a whole request when one conversation is longer than the model takes
    too_large, health_path = frozenset({413, 400}), "/v1/models"

    def __init__(
        self,
        route: Literal["classify", "pooling"],
        tokenizer: str,
        model: str | None,
        variables: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        from reward.chat import ChatEncoder

        hub.bounded()
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
        except Exception as error:  # whatever the readers of its files raise
            raise ValueError(f"no tokenizer at {tokenizer}: {error}") from error
        limit = loaded.model_max_length
        self.path = f"/{route}"
        self._encoder = ChatEncoder(loaded, limit if 0 < limit < UNLIMITED else DEFAULT_MAX_TOKENS, variables, today)
        # Without the task vLLM would pool token by token. Without use_activation it answers a sigmoid.
        fixed = {"use_activation": False} | ({"task": "classify"} if route == "pooling" else {})
        self._head = to_json(fixed | ({"model": model} if model else {}))[:-1]

    def parts(self, items: Sequence[Item]) -> list[tuple[bytes, ...] | str]:
        return [e if isinstance(e, str) else (to_json(e),) for e in self._encoder.encode(items)]

    def request(self, chunk: Sequence[Entry]) -> bytes:
        return self._head + b',"input":[' + b",".join(entry.parts[0] for entry in chunk) + b"]}"

    def read(self, content: bytes, chunk: Sequence[Entry]) -> list[Scored]:
        rows = _parse(content, _NumbersResponse).data
        if [row.index for row in rows] != list(range(len(rows))):
            raise Fault("the scores are in another order")
        numbers = [row.probs if row.probs is not None else row.data for row in rows]
        scores: list[float | None] = []
        for n in numbers:
            if n is None or len(n) != 1:
                raise Fault(f"{len(n or [])} numbers for one item: the model must have one label")
            scores.append(n[0])
        return _scored(scores, None, chunk, None)

    def health(self, content: bytes, url: str) -> Health:
        """vLLM tells the name of its model and no hash. A checkpoint that changes under its name is not noticed here."""
        try:
            found: dict[str, Any] = json.loads(content)["data"][0]
            name, limit = str(found["id"]), int(found.get("max_model_len") or self._encoder.max_tokens)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise Fault(f"an answer of another form: {error!r}") from error
        return Health(
            kind="vllm",
            model=name,
            parameters=0,
            dtype="unknown",
            device="unknown",
            max_tokens=min(limit, self._encoder.max_tokens),
            weights_sha256="",
            template_sha256=self._encoder.template_sha256,
            files={},
        )


class OpenRLHF:
    """OpenRLHF's remote reward: `query` is prompt and response in one text, and `prompts` is the prompt alone.

    With a `tokenizer` its chat template renders the prompt, as OpenRLHF itself does; `variables` are given to it, and
    `today` is the date that it prints. Without one the prompt is the texts of the messages with a blank line between them.
    The format has no place for what scores.
    """

    path, health_path = "/get_reward", None
    too_large = frozenset({413})

    def __init__(
        self, tokenizer: str | None, variables: Mapping[str, Any] | None = None, today: date | None = None
    ) -> None:
        self._tokenizer: Any = None
        self._template_sha256 = hashlib.sha256(b"").hexdigest()
        if tokenizer is not None:
            from transformers import PreTrainedTokenizerFast

            from reward.chat import template_sha256
            from reward.settings import with_date

            given, today = variables or {}, today or date.today()
            self._variables = with_date(given, today)
            hub.bounded()
            try:
                self._tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer)
                self._template_sha256 = template_sha256(self._tokenizer, given, today)
            except Exception as error:  # whatever the readers of its files raise
                raise ValueError(f"no tokenizer with a chat template at {tokenizer}: {error}") from error

    def parts(self, items: Sequence[Item]) -> list[tuple[bytes, ...] | str]:
        found: list[tuple[bytes, ...] | str] = []
        for item in items:
            try:
                prompt = self._prompt(item)
                found.append((to_json(prompt + item.response), to_json(prompt), to_json(item.reference or "")))
            except PydanticSerializationError:
                found.append(NOT_UNICODE)
            except Exception as error:  # a template may raise anything
                found.append(f"the chat template refuses the conversation: {str(error)[:200]}")
        return found

    def _prompt(self, item: Item) -> str:
        if self._tokenizer is None:
            return "\n\n".join(m.content for m in item.messages)
        messages = [{"role": m.role, "content": m.content} for m in item.messages]
        return str(
            self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **self._variables)
        )

    def request(self, chunk: Sequence[Entry]) -> bytes:
        lists = [b",".join(entry.parts[n] for entry in chunk) for n in range(3)]
        return b'{"query":[%b],"prompts":[%b],"labels":[%b]}' % tuple(lists)

    def read(self, content: bytes, chunk: Sequence[Entry]) -> list[Scored]:
        given = _parse(content, GetRewardResponse)
        return _scored(given.rewards, given.errors, chunk, given.weights_sha256)

    def health(self, content: bytes, url: str) -> Health:
        return Health(
            kind="openrlhf",
            model=url,
            parameters=0,
            dtype="unknown",
            device="unknown",
            max_tokens=UNLIMITED,
            weights_sha256="",
            template_sha256=self._template_sha256,
            files={},
        )


def dialect(
    name: Name,
    *,
    tokenizer: str | None,
    model: str | None,
    variables: Mapping[str, Any] | None = None,
    today: date | None = None,
) -> Dialect:
    """The dialect of that name. The other arguments: see Vllm and OpenRLHF. Raises ValueError."""
    if name == "selfplay":
        return Selfplay()
    if name == "openrlhf":
        return OpenRLHF(tokenizer, variables, today)
    if name not in ("vllm-classify", "vllm-pooling"):
        raise ValueError(f"no dialect {name!r}: selfplay, vllm-classify, vllm-pooling or openrlhf")
    if tokenizer is None:
        raise ValueError(
            f"the dialect {name} needs the tokenizer of the reward model, whose chat template renders texts"
        )
    return Vllm("classify" if name == "vllm-classify" else "pooling", tokenizer, model, variables, today)


def _scored(
    scores: Sequence[float | None],
    errors: Sequence[str | None] | None,
    chunk: Sequence[Entry],
    weights: str | None,
    named: bool = False,
) -> list[Scored]:
    errors = errors or [None] * len(chunk)
    if not len(scores) == len(errors) == len(chunk):
        raise Fault(f"{len(scores)} scores for {len(chunk)} items")
    found = []
    for entry, score, reason in zip(chunk, scores, errors, strict=True):
        if score is not None and isfinite(score):
            found.append(Scored(place=entry.place, score=score, reason=None, weights=weights, named=named))
        else:
            why = (reason or f"the score is {score}")[:200]
            found.append(Scored(place=entry.place, score=None, reason=why, weights=weights, named=named))
    return found


def _parse(content: bytes, form: type[Answer]) -> Answer:
    try:
        return form.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
        raise Fault(f"an answer of another form: {where}") from error
