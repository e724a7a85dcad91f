"""How a candidate policy is compared with the champion: win rates, their intervals, KL, and the power of the rule.

Length-controlled win rate: the mean over prompts of the fitted P(win | no length difference), from a logistic
regression of the win on an intercept and the difference of log lengths, log(|y_candidate| / |y_champion|).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

AT_ONCE = 1 << 20  # values that a bootstrap draws at a time: a benchmark may have ten thousand rows


def wins(candidate: ArrayLike, champion: ArrayLike) -> NDArray[np.float64]:
    """1 where the candidate's score is higher, ½ at ties, 0 else; (N,) each."""
    a, b = np.asarray(candidate, np.float64), np.asarray(champion, np.float64)
    return np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))


def bootstrap(values: ArrayLike, samples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), over prompts."""
    v, random = np.asarray(values, np.float64), np.random.default_rng(seed)
    step = max(1, AT_ONCE // v.size)  # in parts, the draws are the same
    sizes = [min(step, samples - start) for start in range(0, samples, step)]
    means = np.concatenate([v[random.integers(0, v.size, (size, v.size))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def length_controlled(won: ArrayLike, length: ArrayLike, champion_length: ArrayLike) -> float:
    """Win rate at equal length. won (N,) in [0, 1]; lengths (N,) in tokens.

    Logistic regression with a penalty of slope² / 2, so that separable data have a finite fit; Newton's method.
    """
    y = np.asarray(won, np.float64)
    x = np.log(np.maximum(np.asarray(length, np.float64), 1) / np.maximum(np.asarray(champion_length, np.float64), 1))
    design = np.stack([np.ones_like(x), x], axis=1)
    ridge = np.diag([1e-6, 1.0])
    theta = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ theta, -30, 30)))
        gradient = design.T @ (y - p) - ridge @ theta
        hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge
        step = np.linalg.solve(hessian, gradient)
        theta += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-np.clip(theta[0], -30, 30))))


def distinct_n(rows: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of the answers' tokens; 0 when there are none."""
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def kl_estimate(logp: ArrayLike, other: ArrayLike) -> float:
    """KL(π ‖ other), nats an answer: mean of log π(y) − log other(y) over answers y sampled from π at temperature 1."""
    return float(np.mean(np.asarray(logp, np.float64) - np.asarray(other, np.float64)))


def power(prompts: int, win_rate: float, least: float, confidence: float) -> float:
    """Probability that the win-rate rule lets a candidate through whose true win rate is `win_rate`, without ties.

    The rule: the lower bound of the measured rate, at this two-sided confidence, is above `least`; 0 asks nothing. Normal
    approximation: the measured rate has standard deviation σ = √(p(1−p)/prompts), and the lower bound lies z·σ below it,
    so the rule passes where the rate is above `least` + z·σ.
    """
    normal = NormalDist()
    sigma = (win_rate * (1 - win_rate) / prompts) ** 0.5
    z = normal.inv_cdf((1 + confidence) / 2)
    if least == 0:
        return 1.0
    if sigma == 0:
        return float(win_rate > least)
    return 1 - normal.cdf((least + z * sigma - win_rate) / sigma)
