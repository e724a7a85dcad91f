import json
from pathlib import Path

import numpy as np
import pytest

from selfplay.methods.potential import alignment_potential, keep_top

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ap.json").read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN)
def test_the_authors_selection_keeps_the_same_pairs(case):
    m_exp, m_imp, keep = np.array(case["explicit_margin"]), np.array(case["implicit_margin"]), case["keep"]
    kept = case["kept"]
    assert keep_top(m_exp, keep).tolist() == kept["explicit"]
    assert keep_top(-m_imp, keep).tolist() == kept["implicit"]
    assert keep_top(alignment_potential(m_exp, m_imp), keep).tolist() == kept["potential_w1"]
    assert keep_top(alignment_potential(m_exp, m_imp, case["weight"]), keep).tolist() == kept["potential_w"]


def test_potential_by_hand():
    """explicit (1, 3): mean 2, std 1 → z (−1, 1); implicit (0, 4): mean 2, std 2 → z (−1, 1); w = .5 → (−.5, .5)."""
    score = alignment_potential([1, 3], [0, 4], weight=0.5)
    assert score.dtype == np.float64
    assert score.tolist() == [-0.5, 0.5]


def test_a_constant_margin_contributes_nothing():
    assert alignment_potential([1, 2, 3], [0.1] * 3).tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert alignment_potential([0.1] * 3, [0.1] * 3).tolist() == [0, 0, 0]


def test_non_finite_margins_stay_out_of_the_statistics_and_are_never_kept():
    clean = alignment_potential([1, 3], [0, 4])
    score = alignment_potential([1, np.nan, 3, 5, np.inf], [0, 1, 4, -np.inf, 2])
    assert score[[0, 2]].tolist() == clean.tolist()
    assert np.isnan(score[[1, 3, 4]]).all()
    assert keep_top(score, 1.0).tolist() == [0, 2]
    assert keep_top([np.nan, np.inf], 1.0).tolist() == []


def test_statistics_of_another_set():
    assert alignment_potential([4], [0], reference=([1, 3], [0, 4])).tolist() == [3.0]


def test_keep_top_is_stable_on_ties_and_keeps_at_least_one():
    assert keep_top([1, 1, 1, 1, 1], 0.4).tolist() == [0, 1]
    assert keep_top([0, 2, 1], 0.01).tolist() == [1]
    assert keep_top([5, 4, 3, 2, 1, 0, 9, 8, 7, 6], 0.3).tolist() == [6, 7, 8]
    assert keep_top([], 0.4).tolist() == []


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="one shape"):
        alignment_potential([1, 2], [1])
