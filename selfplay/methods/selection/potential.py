"""Rank pairs by their alignment potential (AP, Huang et al., 2025, arXiv 2503.01864)."""

from selfplay.methods.potential import alignment_potential
from selfplay.methods.selection import Floats, Margins


def score(margins: Margins) -> Floats:
    """Alignment potential (N,), in standard deviations."""
    return alignment_potential(margins.explicit, margins.implicit, margins.weight, reference=margins.reference)
