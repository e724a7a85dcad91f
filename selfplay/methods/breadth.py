"""Breadth compression (BPO, Wang et al., 2025, arXiv 2411.10914): a few prompts that stand for many.

K-means over prompt embeddings; from each cluster the prompts nearest its centre, in proportion to the cluster's size.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_CLUSTERS = 1024  # the time of K-means grows with their number


def representatives(
    embeddings: ArrayLike, count: int, clusters: int | None = None, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Indices (count,) of the prompts to keep, ascending; cluster (n,) of every prompt; distance (n,) to its centre.

    embeddings (n, d). `clusters`: by default `count`, at most MOST_CLUSTERS (chosen here: of few clusters the prompts
    nearest the centres are so much alike that a random draw covers all prompts better); never more than `count`, since
    every cluster keeps a prompt, nor than there are different embeddings. Raises ValueError for a count outside 1 … n
    and for embeddings that are not finite.
    """
    x = np.asarray(embeddings, np.float32)
    n = len(x)
    if x.ndim != 2 or not 1 <= count <= n:
        raise ValueError(f"{count} representatives of embeddings with shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {n} embeddings are not finite")
    wanted = min(clusters or MOST_CLUSTERS, count)
    labels, centres = kmeans(x, wanted, seed)
    distance = np.linalg.norm(x - centres[labels], axis=1)
    kept = [
        members[np.argsort(distance[members], kind="stable")[:quota]]
        for label, quota in enumerate(quotas(np.bincount(labels), count))
        for members in [np.flatnonzero(labels == label)]
    ]
    return np.sort(np.concatenate(kept)), labels, distance


def kmeans(x: NDArray[np.float32], clusters: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels (n,) and centres (k, d) of K-means over x (n, d); k ≤ clusters, and no cluster is empty."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    different = min(clusters, len({row.tobytes() for row in x}))
    with threadpool_limits(1):  # sums over threads differ from run to run
        fitted = KMeans(different, n_init=1, random_state=seed % 2**32).fit(x)
    used, labels = np.unique(fitted.labels_, return_inverse=True)
    return labels.astype(np.int64), fitted.cluster_centers_[used]


def quotas(sizes: ArrayLike, count: int) -> NDArray[np.int64]:
    """How many prompts each cluster keeps: in proportion to `sizes` (k,), by largest remainder, each at least 1.

    Shares below 1 are raised to 1, and the others shrink in proportion. The sum is `count`, k ≤ count ≤ sum(sizes); of
    equal remainders the larger cluster comes first.
    """
    size = np.asarray(sizes, np.int64)
    assert size.min() >= 1 and len(size) <= count <= size.sum(), f"{count} of clusters of {size}"
    open_ = np.ones(len(size), bool)
    while True:
        left, over = count - int((~open_).sum()), int(size[open_].sum())
        small = open_ & (size * left < over)
        if not small.any():
            break
        open_ &= ~small
    found = np.where(open_, size * left // over, 1)
    remainder = np.where(open_, size * left % over, -1)
    first = np.lexsort((-size, -remainder))[: count - int(found.sum())]
    found[first] += 1
    return found


def evenness(labels: ArrayLike) -> float:
    """Entropy of the cluster sizes over its maximum: 1 where all clusters are equal, towards 0 where one has all."""
    size = np.bincount(np.asarray(labels, np.int64))
    share = size[size > 0] / size.sum()
    return float(-(share * np.log(share)).sum() / math.log(len(share))) if len(share) > 1 else 1.0
