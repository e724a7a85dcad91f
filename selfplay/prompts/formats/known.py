"""The formats that are recognised. A new one is a function here or in a module of its own, and a line in FORMATS.

A function takes a row, whose keys are in small letters, and returns what it asks, why it asks nothing, or None where the
row is of another format. The first format in the list that does not return None reads the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from selfplay.prompts.formats.conversations import Asked, asked_by, conversation, cut, one_message, with_system
from selfplay.prompts.formats.texts import is_blank, text_of
from selfplay.prompts.formats.transcripts import turns_of

Row = Mapping[str, Any]
WHOLE = ""
"""The key of a row that is no object: a text or a list, in a file that has one a line."""
SYSTEM = ("system", "system_prompt", "system_message")
CONVERSATIONS = (
    "conversations", "conversation", "dialog", "dialogue", "dialogs", "dialogues", "chat", "contents", "thread", "conversation_a",
)  # fmt: skip
QUESTIONS = (
    "question", "query", "problem", "problem_statement", "question_text", "question_content", "user_prompt", "user_query",
    "user_input", "human", "prompt_text", "prompts", "request", "instruct_prompt", "goal", "behavior", "post", "inputs", "input", "input_text",
)  # fmt: skip
MAIN = ("prompt", "messages", *CONVERSATIONS, "turns", "instruction", *QUESTIONS)
"""Columns that hold prompts and nothing else: where one is there and empty, the prompt is."""
WITH_INSTRUCTION = ("input", "context", "inputs", "question")
WITH_QUESTION = ("context", "passage")
CHOICES = ("choices", "options")
PLACES = ("parent_id", "message_tree_id", "message_id")
"""Where a message of Open-Assistant stands in its tree."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSIDE = ("row", "body", "data", "example", "json")
"""Keys under which a row lies inside another one."""


@dataclass(frozen=True, slots=True)
class Format:
    name: str
    """As `prompts.format` has it."""
    says: str
    """As it is called in messages."""
    columns: tuple[str, ...]
    """What is read of a row, beside system messages, references and the like."""
    read: Callable[[Row], Asked | str | None]
    only: bool = False
    """Its columns hold much else as well: they are read only where a file has none of MAIN."""


def _trl(row: Row) -> Asked | str | None:
    """TRL, verl and others: `prompt` is a list of messages."""
    value = row.get("prompt")
    if isinstance(value, str) and not value.startswith(("[", "{")):
        return None
    if isinstance(value, str):
        asked = asked_by(value)
        return asked if isinstance(asked, Asked) and asked.roles else None
    if not isinstance(value, list) or not value or all(isinstance(turn, str) for turn in value):
        return None
    return conversation(value)


def _prompt(row: Row) -> Asked | str | None:
    value = row.get("prompt")
    if is_blank(value):
        return None
    if isinstance(value, str):
        if "winner_model_a" in row:  # preferences of the chatbot arena: a list of turns, written in JSON
            found = conversation(value)
            return one_message(found.messages[0]["content"]) if isinstance(found, Asked) else found
        asked = asked_by(value)
        # Where messages come beside the prompt, their system message belongs to it.
        messages = row.get("messages")
        if isinstance(messages, list) and len(messages) > 1 and isinstance(asked, Asked):
            first, second = messages[0], messages[1]
            if isinstance(first, dict) and first.get("role") == "system" and isinstance(second, dict):
                return with_system(asked, first.get("content")) if second.get("content") == value else asked
        return asked
    return asked_by(value)


def _tree(row: Row) -> Asked | str | None:
    """Open-Assistant, a whole tree a row: `prompt` has a text and replies. Its root is the prompt."""
    value = row.get("prompt")
    if not isinstance(value, Mapping) or "replies" not in value:
        return None
    asked = asked_by(value.get("text"))
    return Asked(asked.messages, answered=bool(value["replies"])) if isinstance(asked, Asked) else asked


def _tree_row(row: Row) -> Asked | str | None:
    """Open-Assistant, a message a row. The roots of its trees are prompts; the other messages need those before them."""
    if not isinstance(row.get("role"), str) or "text" not in row or not any(name in row for name in PLACES):
        return None
    is_root = is_blank(row.get("parent_id"))
    if "parent_id" not in row and "message_tree_id" in row:
        is_root = row["message_tree_id"] == row.get("message_id")
    if not is_root:
        return "a later message of its tree"
    if row["role"].lower() not in ("prompter", "user", "human"):
        return "no message of a user"
    return asked_by(row["text"])


def _messages(row: Row) -> Asked | str | None:
    return None if is_blank(row.get("messages")) else conversation(row["messages"])


def _conversations(row: Row) -> Asked | str | None:
    value = next((row[name] for name in CONVERSATIONS if not is_blank(row.get(name))), None)
    return None if value is None or _is_sharegpt(value) else conversation(value)


def _sharegpt(row: Row) -> Asked | str | None:
    value = next((row[name] for name in CONVERSATIONS if not is_blank(row.get(name))), None)
    return conversation(value) if value is not None and _is_sharegpt(value) else None


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) else value
    return isinstance(first, Mapping) and "from" in first


def _turns(row: Row) -> Asked | str | None:
    """MT-Bench: the turns of a user. The first is the prompt, because the second asks about an answer to it."""
    value = row.get("turns")
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], Mapping) and any(key in value[0] for key in ("role", "from")):
        return conversation(value)
    return asked_by(value[0])


def _alpaca(row: Row) -> Asked | str | None:
    """`instruction` with what it is about (`input`, `context`), and earlier turns in `history`."""
    instruction = text_of(row.get("instruction"))
    if instruction is None or not instruction.strip():
        return None
    about = next((row[name] for name in WITH_INSTRUCTION if not is_blank(row.get(name))), None)
    instances = row.get("instances")
    if about is None and isinstance(instances, list) and instances and isinstance(instances[0], Mapping):
        about = instances[0].get("input")
    text = _joined(instruction, about)
    before = row.get("history")
    if not isinstance(before, list) or not before:
        return asked_by(text) if about is None else one_message(text)
    pairs = [pair for pair in before if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(before):
        return "a history that is no list of pairs"
    earlier = [(role, text_of(turn)) for pair in pairs for role, turn in zip(("user", "assistant"), pair, strict=True)]
    return cut([*earlier, ("user", text)], frozenset())


def _question(row: Row) -> Asked | str | None:
    name = next((name for name in QUESTIONS if not is_blank(row.get(name)) and not _is_numeric(row[name])), None)
    if name is None:
        return asked_by(row["user"]) if isinstance(row.get("user"), str) and "assistant" in row else None
    about = next(
        (row[other] for other in WITH_QUESTION if isinstance(row.get(other), str) and row[other].strip()), None
    )
    choices = next((listed for other in CHOICES if (listed := _choices(row.get(other)))), None)
    if isinstance(row[name], str) and (about is not None or choices is not None):
        return one_message(_joined(_joined(row[name], about), choices))
    if isinstance(row[name], list) and len(row[name]) > 1 and all(isinstance(text, str) for text in row[name]):
        return "several texts in one column"
    return asked_by(row[name])


def _preference(row: Row) -> Asked | str | None:
    """A chosen and a rejected conversation: the prompt is what they have in common."""
    chosen, rejected = (
        next((row[name] for name in names if not is_blank(row.get(name))), None)
        for names in (("chosen", "chosen_messages"), ("rejected", "rejected_messages"))
    )
    if chosen is None:
        return None
    asked = conversation(chosen)
    if isinstance(chosen, str) and isinstance(asked, Asked) and not asked.roles and not _has_turns(chosen):
        return None  # the text of an answer
    other = conversation(rejected) if rejected is not None else asked
    if isinstance(asked, str) or isinstance(other, str) or asked.messages == other.messages:
        return asked
    common = takewhile(lambda pair: pair[0] == pair[1], zip(asked.messages, other.messages, strict=False))
    found = cut([(ours["role"], ours["content"]) for ours, _ in common], asked.roles)
    return found if isinstance(found, str) else Asked(found.messages, True, found.roles)


def _text(row: Row) -> Asked | str | None:
    """`text` may be anything. It is a prompt where it is a transcript, or a question of a benchmark."""
    value = next((row[name] for name in ("text", "transcript", "history") if isinstance(row.get(name), str)), "")
    if not value.strip():
        return None
    is_question = any(name in row for name in ("question_id", "test_list", "human_ref_a"))
    return asked_by(value) if is_question or _has_turns(value) else None


def _whole(row: Row) -> Asked | str | None:
    """A row that is a text, or a list of messages."""
    value = row.get(WHOLE)
    return None if value is None else asked_by(value) if isinstance(value, str) else conversation(value)


def _inside(row: Row) -> Asked | str | None:
    """A row inside a row, as servers and logs pack them; or the texts of user and assistant by turns under `data`."""
    for name in INSIDE:
        value = row.get(name)
        if isinstance(value, Mapping) and (inner := read(value)) is not None:
            return inner[1]
    value = row.get("data")
    return conversation(value) if isinstance(value, list) and value and isinstance(value[0], str) else None


FORMATS = (
    Format("tree", "Open-Assistant trees", ("prompt",), _tree),
    Format("trl", "conversations under «prompt» (TRL)", ("prompt",), _trl),
    Format("prompt", "texts under «prompt»", ("prompt", "messages", "winner_model_a"), _prompt),
    Format("messages", "messages", ("messages",), _messages),
    Format("sharegpt", "ShareGPT", CONVERSATIONS, _sharegpt),
    Format("conversations", "conversations", CONVERSATIONS, _conversations),
    Format("tree-rows", "Open-Assistant messages", ("text", "role", *PLACES), _tree_row),
    Format("turns", "turns of a user (MT-Bench)", ("turns",), _turns),
    Format("alpaca", "instructions (Alpaca)", ("instruction", *WITH_INSTRUCTION, "instances", "history"), _alpaca),
    Format("question", "questions", (*QUESTIONS, *WITH_QUESTION, *CHOICES, "user", "assistant"), _question),
    Format(
        "preference", "preferences without a prompt", ("chosen", "rejected", "chosen_messages", "rejected_messages"),
        _preference, only=True,
    ),
    Format("text", "transcripts", ("text", "transcript", "history", "question_id", "test_list", "human_ref_a"), _text, only=True),
    Format("inside", "rows inside of rows", INSIDE, _inside, only=True),
    Format("lines", "a text or a list a row", (WHOLE,), _whole),
)  # fmt: skip
BY_NAME = {one.name: one for one in FORMATS}


def read(row: Row, format: str | None = None) -> tuple[Format, Asked | str] | None:
    """The format of a row and what it asks, or why it asks nothing; None for a row of no format. `format`: only this one."""
    for one in FORMATS if format is None else (BY_NAME[format],):
        found = one.read(row)
        if found is not None:
            if isinstance(found, Asked):
                for name in SYSTEM:
                    if name in row:
                        found = with_system(found, row[name])
            return one, found
    return None


def _joined(text: str, about: Any) -> str:
    more = text_of(about)
    return f"{text}\n\n{more}" if more is not None and more.strip() else text


def _choices(value: Any) -> str | None:
    """The choices of a question, a line each with its letter; they are a list, or have their labels beside them."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        labels, texts = list(value.get("label") or LETTERS), value["text"]
    elif isinstance(value, Mapping):
        labels, texts = list(value), list(value.values())
    else:
        labels, texts = list(LETTERS), value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return None
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=False))


def _has_turns(text: str) -> bool:
    return turns_of(text) is not None


def _is_numeric(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], int | float)
    )
