"""Evaluation of a candidate policy against the champion, and the gate that decides on it. Pure: no IO, no models.

Length-controlled win rate: the mean over prompts of the fitted P(win | no length difference), from a logistic
regression of the win on an intercept and the difference of log lengths, log(|y_candidate| / |y_champion|).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfplay.config import GateConfig
from selfplay.types import Candidate, Verdict


def wins(candidate: ArrayLike, champion: ArrayLike) -> NDArray[np.float64]:
    """1 where the candidate's score is higher, ½ at ties, 0 else; (N,) each."""
    a, b = np.asarray(candidate, np.float64), np.asarray(champion, np.float64)
    return np.where(a > b, 1.0, np.where(a < b, 0.0, 0.5))


def bootstrap(values: ArrayLike, samples: int, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), over prompts."""
    v = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, v.size, (samples, v.size))
    low, high = np.quantile(v[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
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


def compare(
    candidate: Sequence[Candidate],
    champion: Sequence[Candidate],
    scores: ArrayLike,
    champion_scores: ArrayLike,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, float]:
    """Metrics of the candidate's answers beside the champion's, prompt by prompt; scores (N,) by the judge.

    Prompts where either answer has no score (NaN) are left out and counted.
    """
    a, b = np.asarray(scores, np.float64), np.asarray(champion_scores, np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise ValueError("no prompt has a score for both answers")
    won = wins(a[both], b[both])
    length = np.array([c.n_tokens for c in candidate], np.float64)
    champion_length = np.array([c.n_tokens for c in champion], np.float64)
    low, high = bootstrap(won, samples, confidence, seed)
    return {
        "prompts": float(both.sum()),
        "unscored": float((~both).sum()),
        "reward": float(a[both].mean()),
        "reward_champion": float(b[both].mean()),
        "win_rate": float(won.mean()),
        "win_rate_low": low,
        "win_rate_high": high,
        "win_rate_length_controlled": length_controlled(won, length[both], champion_length[both]),
        "length": float(length.mean()),
        "length_ratio": float(length.mean() / max(champion_length.mean(), 1e-9)),
        "distinct_2": distinct_n([c.token_ids for c in candidate]),
        "cut_off": float(np.mean([c.finish_reason != "stop" for c in candidate])),
        "cut_off_champion": float(np.mean([c.finish_reason != "stop" for c in champion])),
        "empty": float(np.mean([not c.text.strip() for c in candidate])),
    }


def power(prompts: int, win_rate: float, rule: GateConfig) -> float:
    """Probability that the win-rate rule lets a candidate through whose true win rate is `win_rate`, without ties.

    Normal approximation: the measured rate has standard deviation σ = √(p(1−p)/prompts), and the lower bound lies z·σ
    below it, so the rule passes where the rate is above `win_rate_lower` + z·σ.
    """
    normal = NormalDist()
    sigma = (win_rate * (1 - win_rate) / prompts) ** 0.5
    z = normal.inv_cdf((1 + rule.confidence) / 2)
    if rule.win_rate_lower == 0:
        return 1.0
    if sigma == 0:
        return float(win_rate > rule.win_rate_lower)
    return 1 - normal.cdf((rule.win_rate_lower + z * sigma - win_rate) / sigma)


def verdict(metrics: dict[str, float], rule: GateConfig, independent: bool) -> Verdict:
    """The gate: promoted unless a limit is broken; every broken one is a reason."""
    m = metrics
    reasons = []
    if rule.win_rate_lower > 0 and not m["win_rate_low"] > rule.win_rate_lower:
        reasons.append(
            f"win rate {m['win_rate']:.3f} with lower bound {m['win_rate_low']:.3f}, not above {rule.win_rate_lower:g}"
        )
    if rule.reward_up and not m["reward"] > m["reward_champion"]:
        reasons.append(f"mean reward {m['reward']:.3f}, not above the champion's {m['reward_champion']:.3f}")
    if not m["kl_current"] <= rule.max_kl:
        reasons.append(f"KL to the current policy {m['kl_current']:.2f} nats an answer, above {rule.max_kl:g}")
    if not 1 / rule.max_length_ratio <= m["length_ratio"] <= rule.max_length_ratio:
        reasons.append(
            f"length ratio {m['length_ratio']:.2f}, outside 1/{rule.max_length_ratio:g} … {rule.max_length_ratio:g}"
        )
    if m["cut_off"] > max(rule.max_cut_off, m["cut_off_champion"]):
        reasons.append(f"{m['cut_off']:.1%} of the answers are cut off, above {rule.max_cut_off:.1%}")
    return Verdict(promoted=not reasons, reasons=reasons, independent=independent)
