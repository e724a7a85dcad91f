"""Alignment potential: how far the policy still is from the target margin of a pair.

AP (Huang et al., 2025, arXiv 2503.01864): M_AP = M_exp − M_imp, ranked as the authors' code does, each margin in
standard deviations of the set.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def alignment_potential(
    explicit: ArrayLike,
    implicit: ArrayLike,
    weight: float = 1.0,
    *,
    reference: tuple[ArrayLike, ArrayLike] | None = None,
) -> Floats:
    """z(explicit) − weight · z(implicit), each z over the set, with the population's standard deviation.

    explicit (N,) in reward units, implicit (N,) in implicit-reward units; returns float64 (N,) in standard deviations.
    `reference`: explicit and implicit margins whose mean and standard deviation are used instead of the set's own (a
    round's base pairs, or recent rounds for a small set). A zero standard deviation makes that term 0. A pair with a
    non-finite margin gets NaN and stays out of the statistics.
    """
    m_exp, m_imp = np.asarray(explicit, np.float64), np.asarray(implicit, np.float64)
    if m_exp.shape != m_imp.shape or m_exp.ndim != 1:
        raise ValueError(f"margins must be two arrays of one shape (N,), got {m_exp.shape} and {m_imp.shape}")
    set_exp, set_imp = (m_exp, m_imp) if reference is None else (np.asarray(m, np.float64) for m in reference)
    usable = np.isfinite(set_exp) & np.isfinite(set_imp)
    score = _z(m_exp, set_exp[usable]) - weight * _z(m_imp, set_imp[usable])
    return np.where(np.isfinite(m_exp) & np.isfinite(m_imp), score, np.nan)


def _z(values: Floats, over: Floats) -> Floats:
    std = over.std() if over.size else 0.0
    # A constant set can have a standard deviation of rounding size.
    if std <= 1e-12 * max(1.0, float(np.abs(over).max(initial=0.0))):
        return np.zeros_like(values)
    return np.asarray((values - over.mean()) / std)


def keep_top(score: ArrayLike, ratio: float) -> NDArray[np.int64]:
    """Indices of the ⌊ratio · N + 1e-9⌋ (at least 1) highest scores, ascending; of equal ones the first.

    score (N,); non-finite scores are never kept and do not count in N. Empty when no score is finite.
    """
    values = np.asarray(score, np.float64)
    finite = np.flatnonzero(np.isfinite(values))
    if not finite.size:
        return finite
    count = max(1, math.floor(ratio * finite.size + 1e-9))
    best = finite[np.argsort(-values[finite], kind="stable")[:count]]
    return np.sort(best)
