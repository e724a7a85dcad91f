"""Implicit rewards of a response: one module for each kind, listed in `selfplay.kinds.IMPLICIT_REWARDS`.

A module has `NEEDS_REFERENCE`, which says whether the reference policy has to score every candidate first, and the function
`reward(logp, n_tokens, reference_logp, beta) -> float`. logp and reference_logp are summed nats over the n_tokens of the
response, under the policy that sampled it and under the reference; reference_logp is NaN where it is not needed. beta is
`train.beta`.
"""
