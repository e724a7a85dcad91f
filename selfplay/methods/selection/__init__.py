"""What base pairs are ranked by: one module for each metric, listed in `selfplay.kinds.SELECTIONS`.

A module has one function, `score(margins) -> (N,)`. The pairs with the highest scores are kept; a score that is not finite
is never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """The margins of N base pairs, and what a metric may compare them with."""

    explicit: Floats  # (N,), reward units
    implicit: Floats  # (N,), units of the implicit reward; signed where `pairs.signed` is set
    weight: float = 1.0
    """`pairs.weight`: how much the implicit margin counts."""
    reference: tuple[Floats, Floats] | None = None
    """Explicit and implicit margins (M,) that give mean and standard deviation; None for those of the N pairs."""
    chance: Floats
    """(N,), seeded random numbers in [0, 1), one for each pair."""
