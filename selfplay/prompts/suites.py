"""Files of benchmarks, read as they are published: prompts whose answers a reward scores, and multiple choice.

A row is a prompt of any prompt file, IFEval's (`prompt`, `instruction_id_list`, `kwargs`), GSM8K's (`question`, `answer` with
«#### 18» at its end), or multiple choice: `question` or `query`, `choices`, and in `answer`, `gold` or `answerKey` which of them
is right, as its number from 0 or as its letter. A benchmark is whole or it is another one, so a row that cannot be read is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from selfplay import seeds
from selfplay.errors import InputError
from selfplay.prompts import formats
from selfplay.prompts.files.kinds import PARQUET, kind_of
from selfplay.prompts.files.part import read_file
from selfplay.prompts.references import reference_of
from selfplay.types import Message, Prompt

QUESTIONS, GOLD = ("question", "query"), ("gold", "answer", "answerKey")
CHOICES, RIGHT = "choices", "gold"  # in the meta of a prompt of multiple choice
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FINAL = "####"  # before the result in an answer of GSM8K


def read(path: Path) -> list[Prompt]:
    """The rows of a benchmark as prompts without token ids; of multiple choice, `meta` has `choices` and the number of the right one.

    Each has a prompt_id of its own, equal prompts too. Raises InputError for a file without rows, for a row that cannot be read,
    and where some rows only are multiple choice.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file", "relative paths start at the working directory")
    found = []
    for number, row in enumerate(_rows(path), 1):
        prompt = row if isinstance(row, str) else _prompt(row, number)
        if isinstance(prompt, str):
            raise InputError(f"{path}, row {number}: {prompt}", "docs/suites.md says what a row may look like")
        found.append(prompt)
    if not found:
        raise InputError(f"{path} has no rows", "a suite needs at least one: mend the file, or take the suite out")
    if len({CHOICES in prompt.meta for prompt in found}) > 1:
        raise InputError(f"{path}: some rows only have `choices`", "make two suites of it")
    return found


def _rows(path: Path) -> Sequence[formats.Row]:
    """All columns of every row: what a benchmark has beside its prompts is what its answers are checked by."""
    if kind_of(path) != PARQUET:
        return list(read_file(path))
    try:
        rows: list[formats.Row] = pq.read_table(path, use_threads=False).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from None
    return rows


def _prompt(row: Mapping[str, Any], number: int) -> Prompt | str:
    """The prompt of a row, or why there is none."""
    messages = _messages(row)
    if isinstance(messages, str):
        return messages
    meta: dict[str, Any] = {}
    reference = None
    if CHOICES in row:
        choices = _choices(row)
        if isinstance(choices, str):
            return choices
        texts, right = choices
        meta = {CHOICES: texts, RIGHT: right}
    else:
        try:
            reference = reference_of(row)
        except (TypeError, ValueError, RecursionError) as error:
            return f"its reference cannot be read ({error})"
        if reference is not None and FINAL in reference:
            reference = reference.rpartition(FINAL)[2].strip().replace(",", "")
    name = f"{seeds.derive(formats.canonical(messages), number):016x}"
    return Prompt(
        prompt_id=name, messages=messages, prompt_ids=[], split="heldout", meta=meta, reference=reference
    )  # fmt: skip


def _messages(row: Mapping[str, Any]) -> list[Message] | str:
    """The conversation of a row: that of a prompt file, or its question."""
    asked = next((row[name] for name in QUESTIONS if isinstance(row.get(name), str)), None)
    if asked is None or row.get("prompt") or row.get("messages"):
        return formats.messages_of(row)
    return formats.messages_of({"prompt": asked}) if asked.strip() else "an empty question"


def _choices(row: Mapping[str, Any]) -> tuple[list[str], int] | str:
    """The choices of a row and the number of the right one, or what is wrong with them."""
    given: Any = row[CHOICES]
    choices, labels = given, list(LETTERS)
    if isinstance(given, dict):  # as in ARC: {"text": […], "label": […]}
        choices, labels = given.get("text"), [str(label) for label in given.get("label") or LETTERS]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return "`choices` is no list of two or more texts"
    answer = next((row[name] for name in GOLD if row.get(name) is not None), None)
    if answer is None:
        return f"none of {', '.join(GOLD)} says which choice is right"
    right = answer if isinstance(answer, int) and not isinstance(answer, bool) else None
    if isinstance(answer, str):
        said = answer.strip(" ().:")
        label = next((label for label in (said, said.upper()) if label in labels), None)
        right = labels.index(label) if label is not None else int(said) if said.isdecimal() else None
    if right is None or not 0 <= right < len(choices):
        return f"the right choice is {answer!r}, which is neither the number nor the letter of one of {len(choices)}"
    return choices, right
