"""Rank pairs by what the reward says alone: the baseline of reward margins."""

from selfplay.methods.selection import Floats, Margins


def score(margins: Margins) -> Floats:
    """Explicit margins (N,): the wider, the better."""
    return margins.explicit
