"""Conversations as a policy reads them: its chat template and its tokenizer. This is the only way that prompts are rendered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from selfplay.errors import InputError
from selfplay.models.encoding import Encoder
from selfplay.types import Message


def load_tokenizer(policy: Path, trust_remote_code: bool) -> Any:
    """The policy's tokenizer; raises InputError for one that cannot be loaded or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {policy} cannot be loaded: {error}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {policy} has no chat template", "use an instruct model, or add chat_template.jinja"
        )
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What a chat template is rendered with beside the conversation."""

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Its variables."""
    today: date
    """The date that it prints, where it prints one: the same on every day of a run."""

    @classmethod
    def read(cls, order: Mapping[str, Any]) -> Template:
        """From what the controller sends (`PolicyConfig.template`)."""
        return cls(kwargs=order["kwargs"], today=date.fromisoformat(order["today"]))

    @property
    def variables(self) -> dict[str, Any]:
        # A variable of this name hides the function by which a template asks for the date.
        return {**self.kwargs, "strftime_now": datetime.combine(self.today, time()).strftime}

    def prints_date(self, tokenizer: Any) -> bool:
        """Whether conversations have other ids on other days."""
        chat = [{"role": "user", "content": "Hello"}]
        days = [Template(kwargs=self.kwargs, today=day).variables for day in (date(2001, 2, 3), date(2019, 11, 22))]
        try:
            texts = {tokenizer.apply_chat_template(chat, tokenize=False, **variables) for variables in days}
        except Exception:  # a template refuses in its own way, and whoever renders with it is told
            return False
        return len(texts) > 1

    def unread(self, tokenizer: Any) -> list[str]:
        """Names of variables that do not occur in the chat template."""
        text = tokenizer.get_chat_template()
        return [name for name in self.kwargs if not re.search(rf"\b{re.escape(name)}\b", text)]


class Renderer:
    """Conversations → token ids, the beginning of the answer included.

    The ids are those of `tokenizer.apply_chat_template(…, add_generation_prompt=True, tokenize=True)`. A batch is rendered
    as texts first and then encoded at once (`encoding.py`), which takes a fraction of the time.
    """

    def __init__(self, tokenizer: Any, template: Template) -> None:
        self._tokenizer, self._variables = tokenizer, template.variables
        backend = _plain_backend(tokenizer)
        self._encode = None if backend is None else Encoder(backend)

    def __call__(self, conversations: Sequence[list[Message]]) -> list[NDArray[np.int32] | str]:
        """The token ids (T,) of each conversation, or why it has none."""
        try:
            return list(self._together(conversations))
        except Exception:  # a template refuses in its own way; which of the conversations it was, is not said
            return [self._alone(messages) for messages in conversations]

    def _together(self, conversations: Sequence[list[Message]]) -> list[NDArray[np.int32]]:
        if not conversations:
            return []
        texts = self._tokenizer.apply_chat_template(
            list(conversations), add_generation_prompt=True, tokenize=False, **self._variables
        )
        if self._encode is not None:
            return self._encode(texts)
        return [np.array(ids, np.int32) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _alone(self, messages: list[Message]) -> NDArray[np.int32] | str:
        try:
            ids = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._variables
            )
            return np.array(ids, np.int32)
        except jinja2.TemplateError as error:  # roles that do not alternate, a role that the template does not know, …
            said = " ".join(str(error).split())[:100]
            return f"cannot be rendered ({type(error).__name__}{': ' * bool(said)}{said})"
        except Exception as error:  # its own mistakes
            return f"cannot be rendered ({type(error).__name__})"


def _plain_backend(tokenizer: Any) -> Any | None:
    """The Rust tokenizer, where the Python object around it adds nothing to its ids.

    Asked directly, it leaves out the offsets, masks and copies that nobody here reads.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own, usual = type(tokenizer), PreTrainedTokenizerFast
    if not issubclass(own, usual) or not hasattr(tokenizer.backend_tokenizer, "encode_batch_fast"):
        return None
    if own.__call__ is not PreTrainedTokenizerBase.__call__ or own._encode_plus is not usual._encode_plus:
        return None
    tokenizer("", add_special_tokens=False)  # it leaves the backend set up: no padding, no truncation
    return tokenizer.backend_tokenizer


def run_encode(order: dict[str, Any]) -> list[list[int]]:
    """The order «encode» of a child: token ids of each text, as a part of an answer."""
    tokenizer = load_tokenizer(Path(order["policy"]), order["trust_remote_code"])
    found: list[list[int]] = tokenizer(order["texts"], add_special_tokens=False)["input_ids"]
    return found


def run_render(order: dict[str, Any]) -> list[list[int] | str]:
    """The order «render» of a child: token ids of each conversation, or why it has none."""
    tokenizer = load_tokenizer(Path(order["policy"]), order["trust_remote_code"])
    render = Renderer(tokenizer, Template.read(order["template"]))
    return [ids if isinstance(ids, str) else ids.tolist() for ids in render(order["conversations"])]
