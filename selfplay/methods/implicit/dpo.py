"""The implicit reward of DPO: β times the log-ratio to the reference (Rafailov et al., 2023, arXiv 2305.18290)."""

from selfplay.methods.margins import implicit_reward_dpo

NEEDS_REFERENCE = True


def reward(logp: float, n_tokens: int, reference_logp: float, beta: float) -> float:
    """β · (log π(y|x) − log π_ref(y|x)), nats."""
    return implicit_reward_dpo(logp, reference_logp, beta)
