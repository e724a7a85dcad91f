"""Ensembles by hand-derived values."""

import math

import numpy as np
import pytest

from selfplay.methods import ensemble


def test_members_are_brought_to_one_scale():
    """Scores 2, 4, 6, 8: mean 5, variance (9+1+1+9)/4 = 5. A constant member says nothing; None is nobody's score."""
    by = ensemble.moments([2.0, 4.0, math.nan, 6.0, 8.0])
    assert (by.mean, by.std) == (5.0, pytest.approx(math.sqrt(5)))
    np.testing.assert_allclose(ensemble.normalise([5.0, 10.0, math.nan], by), [0, math.sqrt(5), np.nan])
    same = ensemble.moments([3.0, 3.0])
    np.testing.assert_array_equal(ensemble.normalise([3.0, 4.0, math.nan], same), [0, 0, np.nan])
    assert np.std([0.1] * 768) > 0 == ensemble.moments([0.1] * 768).std
    assert ensemble.moments([100.0, 100.001]).std == pytest.approx(0.0005)
    with pytest.raises(ValueError, match="no scale"):
        ensemble.moments([math.nan])


def test_combinations_and_disagreement():
    """Columns (1, 3): mean 2, std 1. (2, 2): mean 2, std 0. A missing score makes the item's reward missing."""
    z = [[1.0, 2.0, 0.0], [3.0, 2.0, math.nan]]
    np.testing.assert_allclose(ensemble.combine(z, "mean", 9.0), [2, 2, np.nan])
    np.testing.assert_allclose(ensemble.combine(z, "minimum", 9.0), [1, 2, np.nan])
    np.testing.assert_allclose(ensemble.combine(z, "mean_minus_std", 0.5), [1.5, 2, np.nan])
    np.testing.assert_allclose(ensemble.disagreement(z), [1, 0, np.nan])
