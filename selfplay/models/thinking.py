"""What a policy thinks before it answers: where its thoughts end, and what others may read.

This is the only place that takes thoughts off an answer. Token ids stay whole, so what was thought is trained on.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TAIL = 32  # tokens at the end of a prompt, and at the start of an answer, in which the start mark is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """An answer as others may read it."""

    text: str
    thinking: int
    """Tokens up to the end mark, the marks included; 0 where the policy has not thought."""
    left: bool
    """Whether it has come to an answer; False where its thoughts never end."""


class Thinking:
    """Reads answers of one tokenizer. Thoughts stand at the beginning, up to the first end mark.

    They begin in the prompt where the chat template ends with the start mark, else with the start mark as the first thing
    that is said. A mark may be one token, or several tokens of plain text.
    """

    def __init__(self, tokenizer: Any, *, start: str, end: str, hidden: bool) -> None:
        """hidden: thoughts are no part of the text."""
        self._tokenizer, self._start, self._end, self._hidden = tokenizer, start, end, hidden
        self._end_id: int | None = tokenizer.get_added_vocab().get(end)

    def opened(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside of thoughts: its template has opened them."""
        return self._decode(prompt_ids[-TAIL:]).rstrip().endswith(self._start)

    def read(self, token_ids: NDArray[np.int32], text: str, opened: bool) -> Said:
        """What an answer says. token_ids: (T,). text: all of it, without special tokens. opened: see `opened`."""
        if not opened and not self._decode(token_ids[:TAIL]).lstrip().startswith(self._start):
            return Said(text=text, thinking=0, left=True)
        ended = self._ended(token_ids)
        if ended is None:
            return Said(text="" if self._hidden else text, thinking=len(token_ids), left=False)
        return Said(text=self._after(token_ids[ended:], text) if self._hidden else text, thinking=ended, left=True)

    def _ended(self, token_ids: NDArray[np.int32]) -> int | None:
        """How many tokens there are up to the first end mark; None where there is none."""
        if self._end_id is not None:
            found = np.flatnonzero(token_ids == self._end_id)
            return int(found[0]) + 1 if len(found) else None
        lengths = range(1, len(token_ids) + 1)
        at = bisect.bisect_left(lengths, True, key=lambda n: self._end in self._decode(token_ids[:n]))
        return lengths[at] if at < len(lengths) else None

    def _after(self, token_ids: NDArray[np.int32], text: str) -> str:
        """The part of an answer behind the end mark; token_ids: those behind it."""
        if self._end_id is None:  # its last token may hold the beginning of what follows
            return text.partition(self._end)[2].lstrip()
        # The engine's text lacks a last character of which only some bytes were said.
        return self._decode(token_ids, skip=True).rstrip("\ufffd").lstrip()

    def _decode(self, token_ids: Sequence[int] | NDArray[np.int32], skip: bool = False) -> str:
        """skip: without special tokens. A mark may be one."""
        return str(
            self._tokenizer.decode(
                [int(token) for token in token_ids], skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
        )


def metrics(thinking: Sequence[int | None]) -> dict[str, float]:
    """Of the answers' tokens of thinking: the share of answers that have any, and their mean. Empty where nobody looked."""
    known = [count for count in thinking if count is not None]
    if not known:
        return {}
    thought = [count for count in known if count]
    return {
        "thinking_share": len(thought) / len(known),
        "thinking_tokens": sum(thought) / len(thought) if thought else 0.0,
    }
