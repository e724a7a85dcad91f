"""Candidate and champion on the rows of a suite: scores, their difference, and the veto, by hand."""

import numpy as np
import pytest

from selfplay.config import SuiteConfig
from selfplay.errors import RewardError
from selfplay.evaluation.suites import compare, veto
from selfplay.methods import gate
from selfplay.types import SuiteAnswer


def rows(*scores, **fields):
    fields = {"text": "x", "n_tokens": 3, "finish_reason": "stop", "policy": 1, **fields}
    return [SuiteAnswer(prompt_id=str(i), reward=score, **fields) for i, score in enumerate(scores)]


def compared(candidate, champion):
    return compare("s", candidate, champion, samples=500, confidence=0.95, seed=7)


def suite(**gate):
    return SuiteConfig(name="s", file="f.jsonl", gate=gate or None)


def test_both_policies_are_compared_on_the_rows_that_have_both_scores():
    """Scores .5 and 1 against 0 and 1; the third row has one score only. The difference is that of each row."""
    found = compared(rows(0.5, 1.0, None, reward_parts={"acc": 1.0}), rows(0.0, 1.0, 1.0, n_tokens=5))
    assert (found["prompts"], found["unscored"]) == (2, 1)
    assert (found["score"], found["score_champion"], found["difference"]) == (0.75, 0.5, 0.25)
    low, high = gate.bootstrap(np.array([0.5, 0.0]), 500, 0.95, 7)
    assert (found["difference_low"], found["difference_high"]) == (low, high) == (0.0, 0.5)
    assert (found["acc"], found["length"], found["length_champion"], found["cut_off"]) == (1.0, 3.0, 5.0, 0.0)


def test_a_suite_vetoes_when_the_upper_bound_of_the_difference_is_below_the_limit():
    """All of 40 rows fall by .2: the interval is [−.2, −.2]. With half of them falling by .4 it is wider, and its upper bound higher."""
    plain = compared(rows(*[0.3] * 40), rows(*[0.5] * 40))
    (said,) = veto(suite(max_drop=0.1), plain)
    assert said == "suite s: score 0.500 → 0.300, and the upper bound of the difference [-0.200, -0.200] is below −0.1"
    assert veto(suite(max_drop=0.2001), plain) == veto(suite(), plain) == []
    mixed = compared(rows(*[0.1, 0.5] * 20), rows(*[0.5] * 40))
    assert mixed["difference"] == pytest.approx(-0.2) and -0.2 < mixed["difference_high"] < -0.1
    assert veto(suite(max_drop=0.1), mixed) and not veto(suite(max_drop=0.19), mixed)
    risen = compared(rows(*[0.5] * 40), rows(*[0.3] * 40))
    assert veto(suite(max_drop=0.0), risen) == []


def test_a_suite_without_a_score_for_both_is_an_error():
    with pytest.raises(RewardError, match="suite s: no row has a score for both policies"):
        compared(rows(1.0, None), rows(None, 1.0))
