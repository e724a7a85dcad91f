"""Both margins as one preference probability (after BeeS, arXiv 2502.14560)."""

import numpy as np
import pytest

from selfplay.methods.selection import Margins
from selfplay.methods.selection.fused import LEAST, probability, score


def margins(explicit, implicit, **more):
    e, i = np.array(explicit, np.float64), np.array(implicit, np.float64)
    return Margins(explicit=e, implicit=i, chance=np.zeros(len(e)), **more)


def test_two_independent_sources_are_fused_by_bayes_rule():
    """Over 0 … 100 the line runs from 5 to 95: 50 is 1/2, 77.5 is LEAST + .98 · 72.5/90 = .7994…"""
    over = np.arange(101.0)
    p = probability(np.array([50.0, 77.5, -9.0, 400.0]), over)
    assert p == pytest.approx([0.5, 0.01 + 0.98 * 72.5 / 90, LEAST, 1 - LEAST])
    found = score(margins([50.0, 77.5, 77.5, 400.0], [50.0, 50.0, 77.5, -9.0], reference=(over, over)))
    one = 0.01 + 0.98 * 72.5 / 90
    assert found == pytest.approx([0.5, one, one**2 / (one**2 + (1 - one) ** 2), 0.5])


def test_pairs_that_both_sources_are_sure_of_come_first_and_one_that_they_dispute_in_the_middle():
    rng = np.random.default_rng(0)
    explicit, implicit = rng.normal(size=200), rng.normal(size=200)
    explicit[:3], implicit[:3] = [4.0, 4.0, -4.0], [4.0, -4.0, -4.0]
    found = score(margins(explicit, implicit))
    assert found[0] == found.max() > found[1] > found[2] == found.min()
    assert found[1] == pytest.approx(0.5)


def test_margins_that_are_not_finite_get_none_and_a_constant_set_says_nothing():
    found = score(margins([1.0, np.nan, 2.0, 3.0], [1.0, 1.0, np.inf, 1.0]))
    assert np.isfinite(found).tolist() == [True, False, False, True]
    assert found[3] > found[0]  # the implicit margins are all the same: the explicit ones alone decide
    assert score(margins([], [])).size == 0
