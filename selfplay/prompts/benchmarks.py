"""Prompts of public benchmarks, which are never trained on (`prompts.benchmarks`).

They are compared as held-out prompts are (`held_out.py`): by n-grams of words. A prompt that meets one is left out of the
pool, at the import and when it wants to join later, and is counted under the name of the benchmark's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from selfplay.errors import InputError
from selfplay.prompts.files.part import parts
from selfplay.prompts.formats import prompt_id
from selfplay.prompts.held_out import HeldOut
from selfplay.types import Message, Prompt

AT_A_TIME = 256  # prompts whose n-grams are in memory

Benchmarks = Mapping[str, HeldOut]
"""What a benchmark asks, by the name of its file."""


def read(files: Sequence[str]) -> dict[str, HeldOut]:
    """The prompts of benchmark files, of any known format. Raises InputError."""
    found: dict[str, HeldOut] = {}
    for file in files:
        if not Path(file).is_file():
            raise InputError(
                f"prompts.benchmarks: {file}: no such file", "relative paths start at the working directory"
            )
        rows = [row for part in parts(Path(file)) for row in part.read()]
        asked = [row.messages for row in rows if not isinstance(row, str)]
        if not asked:
            raise InputError(
                f"prompts.benchmarks: {file} has no prompt that can be read",
                "docs/prompts.md lists what is read; `selfplay prompts` shows what is wrong",
            )
        found[Path(file).name] = HeldOut.of(map(_prompt, asked))
    return found


def also_in(
    conversations: Sequence[list[Message]], benchmarks: Benchmarks, ngram: int, overlap: float
) -> list[str | None]:
    """For each conversation the name of a benchmark that has it too, or None. ngram, overlap: see HeldOut."""
    found: list[str | None] = [None] * len(conversations)
    for start in range(0, len(conversations) if benchmarks else 0, AT_A_TIME):
        batch = list(map(_prompt, conversations[start : start + AT_A_TIME]))
        for name, held_out in benchmarks.items():
            for i, met in enumerate(held_out.meets(batch, ngram, overlap), start):
                if met:
                    found[i] = name
    return found


def _prompt(messages: list[Message]) -> Prompt:
    return Prompt(prompt_id=prompt_id(messages), messages=messages, prompt_ids=[], split="heldout")
