"""Rank pairs by both margins fused into one preference probability, the highest first.

After BeeS (Deng et al., 2025, arXiv 2502.14560), which keeps the pairs with the widest margins, and fuses external and
implicit margins into one preference probability by «Bayesian aggregation». The text of the paper that could be had says so
much; its formulas could not be had. What is computed here: each margin becomes the probability that the chosen response is
better, by a straight line from `LEAST` at the set's 5th percentile to 1 − `LEAST` at its 95th, clipped there. Two sources that
err independently of each other give p₁p₂ / (p₁p₂ + (1 − p₁)(1 − p₂)) (Bayes' rule with equal priors).

Alignment potential subtracts the implicit margin, and this adds it: pairs on which reward and policy agree come first.
"""

from __future__ import annotations

import numpy as np

from selfplay.methods.selection import Floats, Margins

LEAST = 0.01  # a probability of 0 or 1 would leave the other margin without a word
ENDS = (0.05, 0.95)  # quantiles of the set between which the line runs: one outlier must not flatten all others


def score(margins: Margins) -> Floats:
    """The fused preference probability (N,), in (0, 1); NaN where one of the margins is not finite."""
    set_exp, set_imp = margins.reference or (margins.explicit, margins.implicit)
    usable = np.isfinite(set_exp) & np.isfinite(set_imp)
    p = probability(margins.explicit, set_exp[usable])
    q = probability(margins.implicit, set_imp[usable])
    return p * q / (p * q + (1 - p) * (1 - q))


def probability(values: Floats, over: Floats) -> Floats:
    """Margins (N,) as probabilities, on a line over the set `over` (M,); 1/2 for each where the set is constant."""
    low, high = np.quantile(over, ENDS) if over.size else (0.0, 0.0)
    if high <= low:
        return np.where(np.isfinite(values), 0.5, np.nan)
    line = LEAST + (1 - 2 * LEAST) * (values - low) / (high - low)
    return np.where(np.isfinite(values), np.clip(line, LEAST, 1 - LEAST), np.nan)
