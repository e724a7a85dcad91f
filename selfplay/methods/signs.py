"""Signs that the reward goes wrong, as numbers.

A reward that is NaN was not given, and has no part in any number. A number that cannot be computed is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfplay.methods.ensemble import moments
from selfplay.methods.shaping import within


def ties(rewards: ArrayLike, groups: Sequence[Hashable], noise: float) -> float:
    """Share of the pairs of answers to one prompt whose rewards differ by no more than `noise`."""
    r = np.asarray(rewards, np.float64)
    by_group: dict[Hashable, list[float]] = {}
    for group, value in zip(groups, r.tolist(), strict=True):
        if math.isfinite(value):
            by_group.setdefault(group, []).append(value)
    tied = pairs = 0
    for values in by_group.values():
        v = np.array(values)
        close = np.abs(v[:, None] - v[None, :]) <= noise
        tied += (int(close.sum()) - len(v)) // 2
        pairs += len(v) * (len(v) - 1) // 2
    return tied / pairs if pairs else math.nan


def saturation(rewards: ArrayLike, noise: float) -> float:
    """Share of the rewards that lie within `noise` of the highest, or of the lowest, whichever has more.

    A reward at the end of its range cannot tell good from better. 1/N where nothing piles up.
    """
    r = _finite(rewards)
    if not len(r):
        return math.nan
    return float(max((r >= r.max() - noise).mean(), (r <= r.min() + noise).mean()))


def length_correlation(rewards: ArrayLike, lengths: ArrayLike, groups: Sequence[Hashable]) -> float:
    """Pearson correlation of reward and length among the answers to one prompt, over all prompts together."""
    r, n = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    n = np.where(np.isfinite(r), n, np.nan)
    r, n = within(r, groups), within(n, groups)
    both = np.isfinite(r)
    size = math.sqrt(float(r[both] @ r[both]) * float(n[both] @ n[both]))
    return float(r[both] @ n[both]) / size if size > 0 else math.nan


def shift(earlier: ArrayLike, now: ArrayLike) -> float:
    """Kolmogorov-Smirnov distance: the largest difference of the two empirical distribution functions, in [0, 1]."""
    a, b = np.sort(_finite(earlier)), np.sort(_finite(now))
    if not len(a) or not len(b):
        return math.nan
    everywhere = np.concatenate([a, b])
    below = [np.searchsorted(v, everywhere, side="right") / len(v) for v in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def probe_change(first: Sequence[float | None], now: Sequence[float | None]) -> float:
    """Largest change of a score of the same texts, in standard deviations of the first scores.

    Texts that have no score now, or had none, are `probe_missing`'s. Where all first scores are equal the change is in
    the scores' own units.
    """
    assert len(first) == len(now), "the probe texts are always the same"
    by = moments([v for v in first if v is not None] or [0.0])
    changes = [abs(a - b) for a, b in zip(first, now, strict=True) if a is not None and b is not None]
    return max(changes, default=0.0) / (by.std or 1.0)


def probe_missing(first: Sequence[float | None], now: Sequence[float | None]) -> float:
    """Share of the same texts that have lost their score or got one: 0 for a model, now and then one for a chat judge."""
    assert len(first) == len(now), "the probe texts are always the same"
    changed = sum((a is None) != (b is None) for a, b in zip(first, now, strict=True))
    return changed / len(first) if first else 0.0


def gold_drop(rewards: Sequence[float], gold: Sequence[float], window: int) -> float:
    """How far gold lies below its best of earlier rounds with a lower reward: over-optimisation. 0 where it does not.

    One value a round, of the policy that samples it (Gao et al., 2023, arXiv 2210.10760). Compared are means over `window`
    rounds, fewer at first: the best of many single rounds is a lucky one. NaN with fewer than two rounds.
    """
    if len(rewards) < 2:
        return math.nan
    wide = np.ones(min(window, len(rewards) // 2))
    r, g = (np.convolve(values, wide / len(wide), "valid") for values in (rewards, gold))
    return float((g[r < r[-1]] - g[-1]).max(initial=0.0))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    v: NDArray[np.float64] = np.asarray(values, np.float64)
    finite: NDArray[np.float64] = v[np.isfinite(v)]
    return finite
