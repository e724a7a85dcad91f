"""What rewards are asked for: conversations, responses and references, read from the artifacts a part at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from selfplay.storage import tables
from selfplay.types import Candidate, Message, Prompt


class Item(NamedTuple):
    """What one score is asked for."""

    messages: list[Message]
    response: str
    reference: str | None = None
    """What the response may be checked by, as the prompt has it."""


class Conversations:
    """The conversations of a round's prompts and their references, by their prompt_ids."""

    def __init__(self, prompts: Path) -> None:
        self._row_of = {prompt_id: row for row, prompt_id in enumerate(tables.read_column(prompts, "prompt_id"))}
        self._prompts = tables.RowReader(prompts, ("messages", "reference"), Prompt)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prompts.__exit__()

    def with_responses(self, candidates: tables.RowReader, rows: Sequence[int] | range) -> list[Item]:
        """The items of the candidates with these row numbers, in this order. Responses to one prompt share one conversation
        object. `candidates` reads the columns `prompt_id` and `text`."""
        said = candidates.take(list(rows))
        asked = said["prompt_id"].to_pylist()
        different = list(dict.fromkeys(asked))
        prompts = self._prompts.take([self._row_of[prompt_id] for prompt_id in different])
        parts = zip(prompts["messages"].to_pylist(), prompts["reference"].to_pylist(), strict=True)
        of_prompt = dict(zip(different, parts, strict=True))
        found = []
        for prompt_id, text in zip(asked, said["text"].to_pylist(), strict=True):
            messages, reference = of_prompt[prompt_id]
            found.append(Item(messages, text, reference))
        return found

    def of_file(self, candidates: Path) -> list[Item]:
        """The items of all candidates in a file. For a shard."""
        with _reader(candidates) as reader:
            return self.with_responses(reader, range(tables.count_rows(candidates)))


class Texts:
    """Conversations and responses of a round's candidates, by the candidates' row numbers."""

    def __init__(self, prompts: Path, candidates: Path) -> None:
        self._conversations = Conversations(prompts)
        self._candidates = _reader(candidates)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._conversations.__exit__(kind, error, trace)
        self._candidates.__exit__()

    def read(self, rows: Sequence[int] | range) -> list[Item]:
        """The items of the candidates with these row numbers, in this order."""
        return self._conversations.with_responses(self._candidates, rows)


def _reader(candidates: Path) -> tables.RowReader:
    return tables.RowReader(candidates, ("prompt_id", "text"), Candidate)
