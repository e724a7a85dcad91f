"""Means over worlds and seeds with their intervals, and how they are written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

MIN_SEEDS = 5  # fewer make no interval


def paired(found: Mapping[str, Any], arm: str, against: str, metric: str) -> dict[tuple[int, int], float]:
    """Differences of a metric between two arms, by world and seed, where both arms have a run."""
    other = found[against]
    return {key: row[metric] - other[key][metric] for key, row in found[arm].items() if key in other}


def cell(values: Mapping[tuple[int, int], float]) -> str:
    return shown(*interval(values)) if len(values) >= MIN_SEEDS else plus_minus(values)


def plus_minus(values: Mapping[tuple[int, int], float]) -> str:
    """The mean ± its standard error, as text."""
    found = list(values.values())
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{statistics.fmean(found):.3f} ± {error:.3f}"


def interval(values: Mapping[tuple[int, int], float], samples: int = 10_000) -> tuple[float, float, float]:
    """Mean of values by world and seed, and the ends of its 95 % interval: a bootstrap of Student's t.

    Seeds are drawn within each world. Worlds are not drawn, and count by their number of seeds: the interval speaks of these
    worlds only. Where a world has one seed there is no interval (NaN).
    """
    groups = [
        np.array([v for key, v in values.items() if key[0] == world], np.float64)
        for world in sorted({world for world, _ in values})
    ]
    total = sum(map(len, groups))
    mean = sum(group.sum() for group in groups) / total
    if min(map(len, groups)) < 2:
        return float(mean), float("nan"), float("nan")

    def spread(drawn: list[np.ndarray]) -> Any:
        """Standard error of the mean over the last axis."""
        return np.sqrt(sum(len(g) * d.var(axis=-1, ddof=1) for g, d in zip(groups, drawn, strict=True))) / total

    rng = np.random.default_rng(0)
    drawn = [rng.choice(group, (samples, len(group))) for group in groups]
    means = sum(d.sum(axis=1) for d in drawn) / total
    errors = spread(drawn)
    usable = errors > 0  # a sample of one seed drawn every time has no error of its own
    low, high = np.quantile((means - mean)[usable] / errors[usable], [0.025, 0.975]) if usable.any() else (0.0, 0.0)
    own = float(spread(groups))
    return float(mean), float(mean - high * own), float(mean - low * own)


def shown(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
