"""Explicit and implicit margins of preference pairs (methods: AP, arXiv 2503.01864, sections 3 and 4)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def implicit_reward(logp: float, n_tokens: int) -> float:
    """Length-normalised implicit reward r̂ = log π_θ(y|x) / |y| (SimPO), nats a token; NaN for an empty response."""
    return logp / n_tokens if n_tokens else float("nan")


def implicit_reward_dpo(logp: float, reference_logp: float, beta: float) -> float:
    """Implicit reward of DPO, r̂ = β · (log π_θ(y|x) − log π_ref(y|x)), from summed log-probabilities in nats."""
    return beta * (logp - reference_logp)


def base_pair(rewards: Sequence[float]) -> tuple[int, int] | None:
    """(chosen, rejected): the positions of the highest and the lowest reward, the first of equals.

    None with fewer than two responses or when all rewards are equal.
    """
    if len(rewards) < 2:
        return None
    chosen = max(range(len(rewards)), key=lambda i: (rewards[i], -i))
    rejected = min(range(len(rewards)), key=lambda i: (rewards[i], i))
    return None if rewards[chosen] == rewards[rejected] else (chosen, rejected)


def two_sigma(rewards: Sequence[float], chosen: int) -> int | None:
    """Position of the response whose reward is nearest to μ − 2σ of all rewards, among those below the chosen one's reward.

    Of equally near ones the lower, then the first. None where no reward is below the chosen one's. Xiao et al., 2025, arXiv
    2502.16825, who find the rejected response best there once there are many candidates. «Nearest» is read from the names of
    the authors' checkpoints, in which the lowest reward is the one at μ − 1000σ. σ is the population's (chosen here). K
    rewards reach no further down than √(K − 1) σ, so with few candidates this is mostly the lowest.
    """
    point = statistics.fmean(rewards) - 2 * math.sqrt(statistics.pvariance(rewards))
    lower = [i for i, reward in enumerate(rewards) if reward < rewards[chosen]]
    return min(lower, key=lambda i: (abs(rewards[i] - point), rewards[i], i), default=None)


def ordered_pairs(rewards: Sequence[float], share: float = 0.25) -> list[tuple[int, int]]:
    """All (chosen, rejected) whose explicit margin is above 0 and at least `share` of the widest one."""
    if not rewards:
        return []
    least = share * (max(rewards) - min(rewards))
    return [
        (i, j)
        for i in range(len(rewards))
        for j in range(len(rewards))
        if rewards[i] > rewards[j] and rewards[i] - rewards[j] >= least
    ]
