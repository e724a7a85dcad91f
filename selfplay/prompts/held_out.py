"""Whether a prompt that wants to join says what a held-out prompt says.

Compared are words without case, punctuation and typographic variants. A word is kept as its CRC-32 and an n-gram as one
number of 64 bits, so that the words of a large held-out set take 4 bytes each and whole columns are compared at a time.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay import seeds
from selfplay.types import Message, Prompt

LEAST_WORDS = 4
"""Shorter texts share their words by chance, so they are compared as a whole."""
MOST_WORDS = 1 << 18  # of held-out prompts that are compared at a time

# A language written without spaces has a word a character.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7ff]|[^\W\u2e80-\u9fff\uac00-\ud7ff]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that makes one number of an n-gram
_BITS = 20
_MASK = np.uint64((1 << _BITS) - 1)
WORDS = pa.list_(pa.int32())
"""Arrow type of the words of one text."""


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and typographic variants; a text without any is its own word."""
    return _WORD.findall(_folded(text)) or [text.strip()]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def same(messages: Sequence[Message]) -> int:
    """A number that is the same for conversations that differ in case, white space and typographic variants alone."""
    return seeds.derive(*(f"{m['role']}\x1f{' '.join(_folded(m['content']).split())}" for m in messages))


def asked(messages: Sequence[Message]) -> NDArray[np.uint32]:
    """The words (W,) of all that the user says, as numbers."""
    said = [word for m in messages if m["role"] == "user" for word in words(m["content"])]
    return np.array([zlib.crc32(word.encode()) for word in said], np.uint32)


class HeldOut:
    """Says which prompts meet a held-out one: the same ancestor, the same words, or too many n-grams in common.

    The overlap of two texts is the share of the n-grams of the one that has fewer which the other has too; so a held-out
    prompt inside a longer text, and a part of a held-out prompt, are found as well. A text of fewer than n words is one
    n-gram of its own length.
    """

    def __init__(self, ancestors: Iterable[str], texts: pa.ListArray) -> None:
        """`texts`: for each held-out prompt its words as `asked` gives them, a list of int32."""
        self._ancestors = frozenset(ancestors)
        self._words = texts.flatten().to_numpy(zero_copy_only=False).view(np.uint32)
        lengths = texts.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> HeldOut:
        """Those of a few prompts."""
        rows = list(prompts)
        return cls([p.ancestor for p in rows], pa.array([asked(p.messages).view(np.int32) for p in rows], WORDS))

    def meets(self, prompts: Sequence[Prompt], ngram: int, overlap: float) -> list[bool]:
        """For each prompt whether it meets a held-out one. `ngram`: words; `overlap`: the least share that counts."""
        texts = [asked(p.messages) for p in prompts]
        found = [p.ancestor in self._ancestors for p in prompts]
        least = min(LEAST_WORDS, ngram)
        # For each size the n-grams of the prompts: those of the full size, and all that are as long as a shorter text.
        ours = {
            n: {i: set(_grams(text, n).tolist()) for i, text in enumerate(texts) if len(text) >= n}
            for n in range(least, ngram + 1)
        }
        wanted = {n: _Wanted(by_prompt.values()) for n, by_prompt in ours.items() if by_prompt}
        by_words: dict[tuple[int, int], list[int]] = {}
        for i, text in enumerate(texts):
            by_words.setdefault((len(text), _whole(text)), []).append(i)
        for start, end in self._chunks():
            lengths, chunk = np.diff(self._starts[start : end + 1]), self._chunk(start, end)
            for equal in zip(lengths.tolist(), _wholes(chunk, lengths), strict=True):
                for i in by_words.get(equal, ()):
                    found[i] = True
            for n, theirs, length in _texts_with(wanted, chunk, lengths):
                for i, grams in ours[n].items():
                    full = n == min(ngram, len(texts[i]))
                    # Below the full size only a held-out text counts that is no longer than this.
                    if not found[i] and (full or length == n) and (shared := len(grams & theirs)):
                        found[i] = shared >= overlap * min(len(grams), len(theirs))
        return found

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of texts that have about MOST_WORDS words together."""
        start, texts = 0, len(self._starts) - 1
        while start < texts:
            end = int(np.searchsorted(self._starts, self._starts[start] + MOST_WORDS, side="right")) - 1
            yield start, (end := min(max(end, start + 1), texts))
            start = end

    def _chunk(self, start: int, end: int) -> NDArray[np.uint32]:
        words: NDArray[np.uint32] = self._words[self._starts[start] : self._starts[end]]
        return words


class _Wanted:
    """N-grams of one size that are looked for."""

    def __init__(self, grams: Iterable[set[int]]) -> None:
        self._sorted = np.array(sorted(set().union(*grams)), np.uint64)
        # Most n-grams of the held-out texts are nobody's: their lowest bits say so at once.
        self._maybe = np.zeros(1 << _BITS, bool)
        self._maybe[self._sorted & _MASK] = True

    def among(self, grams: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Indices of those that are wanted."""
        maybe = np.flatnonzero(self._maybe[grams & _MASK])
        at = np.minimum(np.searchsorted(self._sorted, grams[maybe]), len(self._sorted) - 1)
        found: NDArray[np.int64] = maybe[self._sorted[at] == grams[maybe]]
        return found


def _texts_with(
    wanted: Mapping[int, _Wanted], words: NDArray[np.uint32], lengths: NDArray[np.int64]
) -> Iterator[tuple[int, set[int], int]]:
    """Texts that have wanted n-grams: (n, all different n-grams of the text, its words)."""
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for n, ours in wanted.items():
        grams = _grams(words, n)
        at = ours.among(grams)
        at = at[at + n <= ends[owner[at]]]  # none that begins in one text and ends in the next
        for text in np.unique(owner[at]).tolist():
            end = int(ends[text])
            yield n, set(grams[end - int(lengths[text]) : end - n + 1].tolist()), int(lengths[text])


def _grams(words: NDArray[np.uint32], n: int) -> NDArray[np.uint64]:
    """The n-grams of W words in order, (max(W − n + 1, 0),): polynomials modulo 2^64 whose coefficients are the words."""
    found = np.zeros(max(len(words) - n + 1, 0), np.uint64)
    for k in range(n):
        found *= _ODD
        found += words[k : k + len(found)]
    return found


def _whole(words: NDArray[np.uint32]) -> int:
    return _wholes(words, np.array([len(words)]))[0]


def _wholes(words: NDArray[np.uint32], lengths: NDArray[np.int64]) -> list[int]:
    """A number for all words of each text together."""
    if not len(words):
        return [0] * len(lengths)
    starts = np.cumsum(lengths) - lengths
    powers = np.cumprod(np.full(int(lengths.max()), _ODD, np.uint64))
    terms = powers[np.arange(len(words)) - np.repeat(starts, lengths)] * words
    return np.add.reduceat(terms, starts).tolist()  # type: ignore[no-any-return]
