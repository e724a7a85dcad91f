"""Rank pairs by what the policy says alone: the baseline of implicit margins."""

from selfplay.methods.selection import Floats, Margins


def score(margins: Margins) -> Floats:
    """Negative implicit margins (N,): the less the policy tells the two responses apart, the better."""
    return -margins.implicit
