"""The implicit reward of SimPO: the mean log-probability of a response (Meng et al., 2024, arXiv 2405.14734)."""

from selfplay.methods.margins import implicit_reward

NEEDS_REFERENCE = False


def reward(logp: float, n_tokens: int, reference_logp: float, beta: float) -> float:
    """log π(y|x) / |y|, nats a token."""
    return implicit_reward(logp, n_tokens)
