"""How many further pairs each kept prompt gets, and which (BPO, Wang et al., 2025, arXiv 2411.10914)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESTARTS = (
    8  # K-means from so many starts, the best kept: from one start closeness owes more to the start than to the pairs
)


def allocate(closeness: ArrayLike, pool: ArrayLike, budget: int, temperature: float) -> NDArray[np.int64]:
    """Pairs for each prompt, (n,): one each, the rest in proportion to softmax(closeness / temperature).

    closeness (n,) cosine to the centre of the prompt's gradient cluster; pool (n,) pairs that each prompt can give
    (≥ 1). Each entry is in [1, pool]; the excess of a full pool goes to the others; largest remainder makes the sum
    exactly min(budget, pool.sum()). temperature 0 is uniform. A prompt whose closeness is not finite gets more than one
    pair only where every other pool is full. Raises ValueError for a budget below n.
    """
    c, most = np.asarray(closeness, np.float64), np.asarray(pool, np.int64)
    n = c.size
    if n == 0:
        return np.zeros(0, np.int64)
    if most.min() < 1 or budget < n:
        raise ValueError(f"every prompt needs one pair: budget {budget} for {n} prompts, smallest pool {most.min()}")
    known = np.isfinite(c)
    weights = known.astype(np.float64)
    if temperature > 0 and known.any():
        weights[known] = np.exp((c[known] - c[known].max()) / temperature)
    room = most - 1
    left = int(min(budget, most.sum())) - n
    share = np.zeros(n)
    open_ = room > 0
    while left > 0 and open_.any():
        # Where a weight is 0 (no closeness, or it underflowed) the prompt gets its turn when all others are full.
        w = np.where(open_, weights, 0.0)
        w = w if w.sum() > 0 else open_.astype(np.float64)
        share = np.where(open_, left * w / w.sum(), share)
        full = open_ & (share >= room)
        if not full.any():
            break
        share[full] = room[full]
        left -= int(room[full].sum())
        open_ &= ~full
    extra = np.floor(share + 1e-9).astype(np.int64)
    missing = int(min(budget, most.sum())) - n - int(extra.sum())
    remainder = np.where(extra < room, share - extra, -1.0)
    extra[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return 1 + extra


def temperature(closeness: ArrayLike) -> float:
    """τ of the softmax over closeness (n,): the population's standard deviation of the finite values, 0 without any."""
    finite = _finite(closeness)
    return float(finite.std()) if finite.size else 0.0


def cluster(features: ArrayLike, clusters: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """K-means over gradient features (n, d) at unit length: labels (n,) and closeness (n,).

    closeness[i] = cos(g_i, mean of the unit features of its cluster), in [-1, 1]: how far the gradient of pair i agrees
    with those like it. A zero or non-finite feature has label −1 and closeness NaN. Equal for equal arguments: one
    thread, seeded. With fewer distinct features than `clusters` each of them is a cluster. Raises ValueError for
    features that are not (n, d) and for clusters below 1.
    """
    unit, usable = _unit(features)
    if clusters < 1:
        raise ValueError(f"clusters must be at least 1, got {clusters}")
    labels, closeness = np.full(len(usable), -1, np.int64), np.full(len(usable), np.nan)
    if not usable.any():
        return labels, closeness
    # Imported here: it takes long, and the controller, which allocates, never clusters.
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    clusters = min(clusters, len(np.unique(unit, axis=0)))
    with threadpool_limits(1):  # sums over threads differ from run to run
        found = KMeans(clusters, n_init=RESTARTS, random_state=seed % 2**32).fit(unit).labels_
        sums = np.zeros((clusters, unit.shape[1]))
        np.add.at(sums, found, unit)
        labels[usable], closeness[usable] = found, _cosine(unit, sums[found])
    return labels, closeness


def closeness_to_others(features: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Cosine (n,) of each feature to the centre of the OTHERS in its cluster; NaN without a cluster or without others.

    Gradients that have nothing in common are still at closeness 1/√m in a cluster of m, since each is part of its
    centre; here they are at 0. The mean of this says whether the clusters are there at all.
    """
    unit, usable = _unit(features)
    found = np.asarray(labels, np.int64)[usable]
    result = np.full(len(usable), np.nan)
    if found.size:
        sums = np.zeros((int(found.max()) + 1, unit.shape[1]))
        np.add.at(sums, found, unit)
        alone = np.bincount(found)[found] == 1
        result[usable] = np.where(alone, np.nan, _cosine(unit, sums[found] - unit))
    return result


def sizes(labels: ArrayLike) -> NDArray[np.float64]:
    """How many features are in the cluster of each, (n,); NaN without a cluster."""
    found = np.asarray(labels, np.int64)
    counts = np.bincount(found[found >= 0], minlength=1)
    return np.where(found >= 0, counts[found], np.nan)


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's ρ of two arrays (n,) over the entries that are finite in both; NaN where a side is constant."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    ranks = [_ranks(values[both]) for values in (x, y)]
    if both.sum() < 2 or any(r.std() == 0 for r in ranks):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts + 1) / 2)[inverse])


def _unit(features: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The usable features at unit length (m, d), and which of the n rows they are."""
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2:
        raise ValueError(f"features must be (n, d), got {rows.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    usable = np.isfinite(norms) & (norms > 0)
    return rows[usable] / norms[usable, None], usable


def _cosine(unit: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine (m,) of unit rows to other rows; 0 to a zero row, which has no direction to agree with."""
    norms = np.linalg.norm(centres, axis=1)
    cosines = (unit * centres).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    return np.asarray(np.clip(cosines, -1.0, 1.0))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    return np.asarray(array[np.isfinite(array)])
