"""Signs, before a round trains, that its pairs would teach the wrong thing: how long to answer, or to say the same again.

Of N answers to P prompts; the answers to a prompt follow each other. A number that cannot be computed is NaN.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfplay.methods.shaping import repetition

FEWEST = 16  # pairs below which length decides many of them by chance

Rows = NDArray[np.int64]


def base_pairs(rewards: ArrayLike, can_win: ArrayLike, can_lose: ArrayLike, starts: ArrayLike) -> tuple[Rows, Rows]:
    """Rows (B,) of the chosen and of the rejected answer of each prompt that has a pair: highest against lowest reward.

    rewards (N,). can_win, can_lose (N,): which answers may be chosen, and rejected. starts (P + 1,): the answers to prompt p
    are rows starts[p] … starts[p + 1] − 1. Of equal rewards the first counts, as in `methods/margins.py`.
    """
    values, bounds = np.asarray(rewards, np.float64), np.asarray(starts, np.int64)
    prompt = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    chosen = _first_of(prompt, -values, np.asarray(can_win, np.bool_), len(bounds) - 1)
    rejected = _first_of(prompt, values, np.asarray(can_lose, np.bool_), len(bounds) - 1)
    both = (chosen >= 0) & (rejected >= 0)
    chosen, rejected = chosen[both], rejected[both]
    wider = values[chosen] > values[rejected]
    return chosen[wider], rejected[wider]


def _first_of(prompt: Rows, key: NDArray[np.float64], among: NDArray[np.bool_], count: int) -> Rows:
    """(P,): for each prompt the row with the lowest key among those of a mask, the first of equals; −1 where none is."""
    rows = np.flatnonzero(among & np.isfinite(key))
    rows = rows[np.lexsort((rows, key[rows], prompt[rows]))]
    found = np.full(count, -1, np.int64)
    found[prompt[rows[::-1]]] = rows[::-1]  # what is assigned last stays
    return found


def length_gap(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """How much shorter one side of the pairs is, in (−1, 1): 0.75 where the rejected answers have a quarter of the tokens of
    the chosen ones on average, −0.75 where it is the other way round. chosen, rejected (B,): tokens."""
    w, l = (float(np.sum(np.asarray(lengths, np.float64))) for lengths in (chosen, rejected))  # noqa: E741
    return (w - l) / max(w, l) if max(w, l) > 0 else math.nan


def decided_by_length(chosen: ArrayLike, rejected: ArrayLike) -> float:
    """Share of the pairs in which the longer answer wins, or the shorter one, whichever are more, in [0.5, 1].

    At 1 the length alone tells which answer is chosen, and that is all that the pairs can teach for sure. chosen, rejected (B,):
    tokens; pairs of equal length count half. The sign is − where the shorter one wins. NaN with fewer than `FEWEST` pairs.
    """
    w, l = np.asarray(chosen, np.int64), np.asarray(rejected, np.int64)  # noqa: E741
    if len(w) < FEWEST:
        return math.nan
    longer = float((w > l).mean() + (w == l).mean() / 2)
    return longer if longer >= 0.5 else longer - 1


def repeated(tokens: ArrayLike, starts: ArrayLike, ngram: int) -> float:
    """Mean of `shaping.repetition` over the answers, whose arguments these are."""
    shares = repetition(tokens, starts, ngram)
    return float(shares.mean()) if len(shares) else math.nan
