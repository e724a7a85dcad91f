"""Which pairs of earlier rounds are trained on again: a seeded draw, so that a round that is resumed draws the same ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def draw(sizes: Sequence[int], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Rows to take from each of several files, ascending: `count` of all rows without repetition, every row as likely.

    sizes: rows of each file. All rows where there are not so many.
    """
    bounds = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)
    total = int(bounds[-1])
    chosen = np.sort(np.random.default_rng(seed % 2**63).choice(total, min(count, total), replace=False))
    return [chosen[(chosen >= low) & (chosen < high)] - low for low, high in itertools.pairwise(bounds)]
