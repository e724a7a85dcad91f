"""Keep pairs by chance: the baseline without any metric."""

from selfplay.methods.selection import Floats, Margins


def score(margins: Margins) -> Floats:
    """Seeded random numbers (N,)."""
    return margins.chance
