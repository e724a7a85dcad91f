"""The texts that rewards are asked for: conversations and responses, read from the artifacts a part at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from selfplay.storage import tables
from selfplay.types import Candidate, Message, Prompt

Item = tuple[list[Message], str]  # a conversation, and a response to it


class Texts:
    """Conversations and responses of a round's candidates, by the candidates' row numbers.

    Responses to one prompt share one conversation object.
    """

    def __init__(self, prompts: Path, candidates: Path) -> None:
        self._row_of = {prompt_id: row for row, prompt_id in enumerate(tables.read_column(prompts, "prompt_id"))}
        self._prompts = tables.RowReader(prompts, ("messages",), Prompt)
        self._candidates = tables.RowReader(candidates, ("prompt_id", "text"), Candidate)

    def __enter__(self) -> Texts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._prompts.__exit__()
        self._candidates.__exit__()

    def read(self, rows: Sequence[int] | range) -> list[Item]:
        """The items of the candidates with these row numbers, in this order."""
        said = self._candidates.take(list(rows))
        asked = said["prompt_id"].to_pylist()
        different = list(dict.fromkeys(asked))
        conversations = self._prompts.take([self._row_of[prompt_id] for prompt_id in different])["messages"]
        of_prompt = dict(zip(different, conversations.to_pylist(), strict=True))
        return [(of_prompt[prompt_id], text) for prompt_id, text in zip(asked, said["text"].to_pylist(), strict=True)]
