"""Several rewards as one: each brought to a scale of its own, then combined; where they disagree is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Combine = Literal["mean", "minimum", "mean_minus_std"]
ROUNDING = 1e-6  # of the largest score: what differs by less is the same score


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and population standard deviation of one member's scores, in its own units."""

    mean: float
    std: float


def moments(scores: ArrayLike) -> Moments:
    """Moments of the finite scores (N,), with a standard deviation of 0 where they differ by rounding errors alone.

    Raises ValueError where none is finite.
    """
    values = np.asarray(scores, np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("a member without any finite score has no scale")
    std = float(values.std())
    # even of equal numbers the standard deviation is seldom 0: their mean is rounded; scores are float32 at best
    return Moments(mean=float(values.mean()), std=std if std > ROUNDING * float(np.abs(values).max()) else 0.0)


def normalise(scores: ArrayLike, by: Moments) -> Array:
    """Scores in standard deviations from the mean; 0 for a member that gave every item the same."""
    values = np.asarray(scores, np.float64)
    return (values - by.mean) / by.std if by.std > 0 else np.where(np.isfinite(values), 0.0, np.nan)


def combine(z: ArrayLike, how: Combine, penalty: float) -> Array:
    """One reward (N,) from the members' normalised scores (M, N); NaN where a member has none.

    `minimum` and `mean_minus_std` (mean − penalty · population std) are the conservative combinations of Coste et al.
    (2024, arXiv 2310.02743): what one member alone likes is not rewarded.
    """
    values: Array = np.asarray(z, np.float64)
    lowest: Array = values.min(axis=0)  # numpy's minimum is NaN where any is
    mean: Array = values.mean(axis=0)
    return {"mean": mean, "minimum": lowest, "mean_minus_std": mean - penalty * disagreement(values)}[how]


def disagreement(z: ArrayLike) -> Array:
    """Population standard deviation over the members of their normalised scores (M, N), (N,)."""
    apart: Array = np.asarray(z, np.float64).std(axis=0)
    return apart
