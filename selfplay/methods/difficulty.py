"""Which prompts of a round are the easier ones.

Xiao et al., 2025, arXiv 2510.05534: the mean reward of a prompt's sampled responses stands for how easy it is, and training
on the easier share of the prompts alone does better than training on all of them (30 % in the second version of the paper).
Measure and rule are as its abstract gives them. The paper ranks the prompts of a fixed data set once; here the prompts of a
round are ranked, because each round samples others.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfplay.methods.potential import keep_top


def mean_rewards(rewards: ArrayLike, starts: ArrayLike) -> NDArray[np.float64]:
    """Mean reward of each prompt's responses, (P,), over those that have one; NaN where none has.

    rewards (N,): NaN where a response has none. starts (P + 1,): the responses of prompt p are rows starts[p] … starts[p + 1] − 1.
    """
    values, bounds = np.asarray(rewards, np.float64), np.asarray(starts, np.int64)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    n = counts[bounds[1:]] - counts[bounds[:-1]]
    total = sums[bounds[1:]] - sums[bounds[:-1]]
    means: NDArray[np.float64] = np.divide(total, n, out=np.full(len(n), math.nan), where=n > 0)
    return means


def easiest(means: ArrayLike, share: float) -> NDArray[np.bool_]:
    """(P,): whether a prompt is of the ⌊share · P + 1e-9⌋ (at least 1) with the highest mean rewards, the first of equals.

    means (P,): a prompt whose mean is not finite is never of them, and does not count in P.
    """
    found = np.zeros(len(np.asarray(means)), np.bool_)
    found[keep_top(means, share)] = True
    return found
