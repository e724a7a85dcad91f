"""Conversations of every shape as messages with the usual roles, and the prompt that a conversation is.

The prompt of a conversation is all of it up to the last message of its user. What comes after that is an answer, and an
answer is dropped: the policy gives its own.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfplay.prompts.formats.texts import text_of
from selfplay.prompts.formats.transcripts import turns_of
from selfplay.types import Message

ROLES = {
    "human": "user", "prompter": "user", "customer": "user", "client": "user", "instruction": "user", "question": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "chatbot": "assistant", "assistants": "assistant", "bard": "assistant", "bing": "assistant", "claude": "assistant",
    "gpt4": "assistant", "gpt-4": "assistant", "llm": "assistant", "response": "assistant", "answer": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "function": "tool",
    "function_response": "tool", "function-call": "assistant", "tool_response": "tool", "sys": "system", "system_prompt": "system",
}  # fmt: skip
"""Names of roles in data sets, and what templates call them. A role that is not here keeps its name in small letters."""
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "parts", "utterance")
PAIRS = (
    ("human", "assistant"), ("human", "gpt"), ("user", "assistant"), ("input", "output"), ("question", "answer"),
    ("prompt", "response"), ("instruction", "response"), ("instruction", "output"), ("query", "response"), ("user", "bot"),
)  # fmt: skip
"""Keys of an object that holds two turns: what the user says, and the answer."""
USUAL = ("user", "assistant", "system", "tool")
_LISTED = re.compile(r'\s*(\[\s*[\[{"\']|\{\s*["\'])')  # how a list or an object begins that is written as text
MOST_LETTERS = 1 << 18  # of a text that is read as Python prints it, which takes long
_WORD = re.compile(r"[A-Za-z_-]{1,32}")
NO_MESSAGE = "a message without role and content"

Turn = tuple[str, str | None]
"""(role, text); the text is None for a message that has none, such as a call of a tool."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks."""

    messages: list[Message]
    answered: bool = False
    """Whether an answer came after the prompt, which was dropped."""
    roles: frozenset[tuple[str, str]] = frozenset()
    """(name in the file, name here) of the roles; empty for a text that has no roles."""


def one_message(text: str) -> Asked:
    """The prompt that a text is."""
    return Asked([{"role": "user", "content": text}])


def asked_by(value: Any) -> Asked | str:
    """The prompt of a column: a text, a transcript, or a conversation of any shape; or why it has none."""
    if isinstance(value, str):
        if value.startswith(("[", "{")) and (decoded := _decoded(value)) is not None:
            return asked_by(decoded)
        turns = turns_of(value)
        if turns is None:
            return one_message(value) if value.strip() else "an empty prompt"
        return cut(turns, frozenset())
    if isinstance(value, Mapping) and isinstance(text := text_of(value), str):
        return asked_by(text)
    if isinstance(value, Mapping) and not any(isinstance(inner, list) for inner in value.values()):
        return "a prompt that is no text"
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        return asked_by(value[0])  # turns of the user alone: the second one asks about an answer to the first
    if isinstance(value, list | Mapping):
        return conversation(value)
    text = text_of(value)
    return "a prompt that is no text" if text is None else asked_by(text)


def conversation(value: Any) -> Asked | str:
    """The prompt of a conversation: a list of messages, of pairs, or of texts that user and assistant say by turns."""
    if isinstance(value, str):
        decoded = _decoded(value, texts=True)
        if decoded is None:
            return "a conversation that is no JSON" if _LISTED.match(value) else asked_by(value)
        value = decoded
    if isinstance(value, Mapping):
        value = _in_rows(value)
    if not isinstance(value, list) or not value:
        return "an empty conversation"
    if all(isinstance(item, str) for item in value):
        if all(item.startswith("{") for item in value):
            return conversation(f"[{','.join(value)}]")
        return cut([("assistant" if i % 2 else "user", text) for i, text in enumerate(value)], frozenset())
    if all(isinstance(item, list) for item in value):
        if len(value) == 1 and value[0] and isinstance(value[0][0], Mapping):
            return conversation(value[0])
        if all(len(pair) == 2 and isinstance(pair[0], str) and _role(pair[0]) in USUAL for pair in value):
            return conversation([{"role": role, "content": text} for role, text in value])
        texts = [text_of(text) for pair in value for text in pair]
        return cut([("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)], frozenset())
    turns: list[Turn] = []
    roles = set[tuple[str, str]]()
    for item in value:
        if not isinstance(item, Mapping) or not (found := _turns(item, roles)):
            return NO_MESSAGE
        turns += found
    if not all(_WORD.fullmatch(role) for role, _ in turns):
        return "a role that is no word"
    return cut(turns, frozenset(roles))


def cut(turns: Sequence[Turn], roles: frozenset[tuple[str, str]]) -> Asked | str:
    """The prompt that turns are: all up to the last one of the user. Blank system messages are left out.

    Where a message before it is empty or no text, such as a call of a tool, the last one of the user before that counts.
    """
    messages: list[Message] = []
    end, why = 0, ""  # messages of the prompt, and what is wrong with the first message behind them
    used = 0
    for number, (role, text) in enumerate(turns, 1):
        if text is None or not text.strip():
            if role == "system" and text is not None:
                continue
            why = "a message that is no text" if text is None else "an empty message"
            break
        messages.append({"role": role, "content": text})
        if role == "user":
            end, used = len(messages), number
    if not end:
        return why if any(role == "user" for role, _ in turns) else "no message of a user"
    answered = any(text is None or text.strip() for _, text in turns[used:])
    return Asked(messages[:end], answered, roles)


def with_system(asked: Asked, system: Any) -> Asked:
    """The prompt with a system message at its front, where it has none and one is given."""
    if system is None:  # as in most rows
        return asked
    text = text_of(system)
    if text is None or not text.strip() or asked.messages[0]["role"] in ("system", "developer"):
        return asked
    return Asked([{"role": "system", "content": text}, *asked.messages], asked.answered, asked.roles)


def _turns(item: Mapping[str, Any], roles: set[tuple[str, str]]) -> list[Turn]:
    """The turns of an object: one message, or a pair of them; none where it is neither."""
    role = next((item[key] for key in ROLE_KEYS if isinstance(item.get(key), str)), None)
    if role is not None:
        there = [item[key] for key in CONTENT_KEYS if key in item]
        if not there and not item.get("tool_calls"):
            return []
        name = _role(role)
        roles.add((role, name))
        return [(name, text_of(next((value for value in there if value is not None), None)))]
    for user, assistant in PAIRS:
        if user in item and (assistant in item or len(item) == 1):
            roles.update({(user, "user"), (assistant, "assistant")})
            given = [("user", text_of(item[user])), ("assistant", text_of(item.get(assistant)))]
            return given if given[1][1] is not None else given[:1]
    small = {str(key).lower(): inner for key, inner in item.items()}
    return _turns(small, roles) if small.keys() != item.keys() else []


def _role(name: str) -> str:
    own = name.strip().lower()
    return ROLES.get(own, own)


def _in_rows(value: Mapping[str, Any]) -> Any:
    """The list of messages of an object: under a key, or with a list for each key, as `datasets` keeps a sequence."""
    for key in ("messages", "conversations", "conversation"):
        if isinstance(value.get(key), list):
            return value[key]
    lists = {key: inner for key, inner in value.items() if isinstance(inner, list)}
    if len({len(inner) for inner in lists.values()}) != 1:
        return None
    return [dict(zip(lists, inner, strict=True)) for inner in zip(*lists.values(), strict=True)]


def _decoded(text: str, texts: bool = False) -> Any | None:
    """The conversation that a text is, written in JSON or as Python prints it; None for any other text.

    `texts`: a list of texts is a conversation too, and not a prompt that happens to be a list.
    """
    start = text.lstrip()
    if not _LISTED.match(start):
        return None
    for decode in (json.loads, ast.literal_eval, _of_numpy) if len(start) < MOST_LETTERS else (json.loads,):
        try:
            found = decode(start)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if _is_conversation(found, texts) else None
    return None


def _of_numpy(text: str) -> Any:
    """An array of objects as numpy prints it: without commas between them."""
    return ast.literal_eval(re.sub(r"\}\n ?\{", "}, {", text))


def _is_conversation(value: Any, texts: bool) -> bool:
    items = value if isinstance(value, list) else _in_rows(value) if isinstance(value, Mapping) else None
    if not isinstance(items, list) or not items:
        return False
    if all(isinstance(item, str) for item in items):
        return texts
    return all(isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS) for item in items)
