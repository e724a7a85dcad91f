"""Corrections to a round's rewards for what a reward model likes for no good reason: length, repetition, an open end.

Each function returns one term to ADD to the rewards, (N,), so that they can be recorded apart. A reward that is NaN
(none was given) has no part in any statistic; its terms are finite all the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def means(values: ArrayLike, groups: Sequence[Hashable]) -> Array:
    """For each of the values (N,) the mean of its group, over the finite ones; 0 where a group has none."""
    v = np.asarray(values, np.float64)
    codes = {group: code for code, group in enumerate(dict.fromkeys(groups))}
    at = np.array([codes[g] for g in groups], np.int64)
    finite = np.isfinite(v)
    counts = np.bincount(at[finite], minlength=len(codes))
    sums = np.bincount(at[finite], weights=v[finite], minlength=len(codes))
    found: Array = np.divide(sums, counts, out=np.zeros(len(codes)), where=counts > 0)[at]
    return found


def within(values: ArrayLike, groups: Sequence[Hashable]) -> Array:
    """Values (N,) minus the mean of their group, over the finite ones; NaN stays NaN."""
    v = np.asarray(values, np.float64)
    return np.where(np.isfinite(v), v - means(v, groups), np.nan)


def length_slope(rewards: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Reward for each further token: least squares over the round, with an intercept for each group (prompt).

    Pairs compare answers to one prompt, so that a prompt which asks for long answers and gets high rewards says nothing
    about a liking for length. 0 where no prompt has answers of different lengths.
    """
    r, n = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    n = np.where(np.isfinite(r), n, np.nan)
    r, n = within(r, groups), within(n, groups)
    both = np.isfinite(r)
    variance = float(n[both] @ n[both])
    return float(r[both] @ n[both]) / variance if variance > 0 else 0.0


def length_control(rewards: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable], share: float) -> Array:
    """Takes `share` of the rewards' linear dependence on length out; the round's mean reward stays as it is.

    Answers to one prompt that have the same reward get the same term, that of their mean length: what the reward does
    not tell apart, its correction does not either. Otherwise a reward with few values, such as right or wrong, would give
    pairs in which length alone decides.

    The idea of length-controlled win rates (Dubois et al., 2024, arXiv 2404.04475), applied to the reward by regression.
    """
    r, n = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    scored = np.isfinite(r)
    if not scored.any():
        return np.zeros(len(n))
    alike = np.where(scored, means(n, list(zip(groups, r.tolist(), strict=True))), n)
    term: Array = -share * length_slope(r, n, groups) * (alike - n[scored].mean())
    return term


def length_penalty(lengths: ArrayLike, per_token: float, free: int) -> Array:
    """−`per_token` for each token beyond `free`."""
    beyond: Array = np.maximum(np.asarray(lengths, np.float64) - free, 0.0)
    term: Array = -per_token * beyond
    return term


def repetition(tokens: ArrayLike, starts: ArrayLike, ngram: int) -> Array:
    """Share (M,) of each response's n-grams of tokens that occurred in it before: 0 when none did, towards 1 in a loop.

    tokens (T,): the ids of M responses, one after the other. starts (M + 1,): response i has the tokens
    starts[i] … starts[i + 1] − 1. A response that is too short for an n-gram has none.
    """
    ids, bounds = np.asarray(tokens, np.int64), np.asarray(starts, np.int64)
    response = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    count = max(0, len(ids) - ngram + 1)
    whole = response[:count] == response[len(ids) - count :]
    # A hash instead of response and tokens: two of 2⁶⁴ are equal by chance so seldom that it does not show in a share.
    key = _mixed(response[:count].astype(np.uint64))
    for place in range(ngram):
        key = _mixed(key ^ ids[place : place + count].astype(np.uint64))
    response, key = response[:count][whole], key[whole]
    grams = np.bincount(response, minlength=len(bounds) - 1)
    order = np.argsort(key)
    first = np.ones(len(key), np.bool_)
    first[1:] = key[order][1:] != key[order][:-1]
    distinct = np.bincount(response[order][first], minlength=len(bounds) - 1)
    share: Array = np.divide(grams - distinct, grams, out=np.zeros(len(grams)), where=grams > 0)
    return share


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Numbers of 64 bits, scattered one to one."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return values ^ (values >> np.uint64(29))


def beyond_length(shares: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable], whole: ArrayLike) -> Array:
    """Repetition (N,) less what answers of the same length have: a long answer has said more before, whatever it says.

    The line is fitted within each prompt (`length_slope`) to the answers that are `whole` (N,), because those that were cut off
    are often loops. Without this the shortest of answers with the same reward is chosen and the longest rejected.
    """
    values, n, ended = np.asarray(shares, np.float64), np.asarray(lengths, np.float64), np.asarray(whole, np.bool_)
    if not ended.any():
        return values
    slope = length_slope(np.where(ended, values, np.nan), n, groups)
    found: Array = values - slope * (n - n[ended].mean())
    return found


def cut_off_penalty(finish_reasons: Sequence[str], penalty: float) -> Array:
    """−`penalty` for a response that hit the token limit."""
    return -penalty * np.array([reason == "length" for reason in finish_reasons], np.float64)
