"""The signs of a reward that goes wrong, computed by hand."""

import math

import pytest

from selfplay.methods import signs

NAN = math.nan


def test_ties_are_counted_within_prompts():
    """Prompt a: 1, 1, 2: one of three pairs. Prompt b: 1, 1.05: one of one at noise .1. b's 1 and a's 1 are no pair."""
    rewards, groups = [1.0, 1.0, 2.0, 1.0, 1.05, NAN], ["a", "a", "a", "b", "b", "b"]
    assert signs.ties(rewards, groups, 0.1) == 0.5
    assert signs.ties(rewards, groups, 0.0) == 0.25
    assert math.isnan(signs.ties([1.0, 2.0], ["a", "b"], 0.0))


def test_saturation_is_what_piles_up_at_an_end():
    assert signs.saturation([5.0, 5.0, 5.0, 1.0, 2.0, NAN], 0.0) == 0.6
    assert signs.saturation([0.0, 0.0, 3.0, 1.0], 0.0) == 0.5
    assert signs.saturation([4.95, 5.0, 1.0, 2.0], 0.1) == 0.5
    assert math.isnan(signs.saturation([NAN], 0.0))


def test_length_correlation_is_that_within_prompts():
    """Within each prompt the longer answer has the lower reward; between prompts it is the other way round."""
    assert signs.length_correlation([1.0, 0.0, 11.0, 10.0], [1, 2, 101, 102], ["a", "a", "b", "b"]) == pytest.approx(-1)
    # centred rewards −1 0 1, centred lengths 1 −2 1: no correlation
    assert signs.length_correlation([0.0, 1.0, 2.0, NAN], [4, 1, 4, 99], "aaaa") == pytest.approx(0)
    assert math.isnan(signs.length_correlation([1.0, 2.0], [3, 3], "aa"))


def test_shift_is_the_largest_distance_of_the_distributions():
    """Of 1 2 3 4 half lie at or below 2, of 3 4 5 6 none; elsewhere the distance is no larger."""
    assert signs.shift([4.0, 3.0, 2.0, 1.0, NAN], [3.0, 4.0, 5.0, 6.0]) == 0.5
    assert signs.shift([1.0, 1.0, 2.0], [1.0, 2.0, 1.0]) == 0.0
    assert signs.shift([1.0], [2.0]) == 1.0
    assert math.isnan(signs.shift([], [1.0]))


def test_probes_change_in_units_of_their_spread():
    """First scores 0 and 2: standard deviation 1."""
    assert signs.probe_change([0.0, 2.0, None], [0.5, 1.9, None]) == pytest.approx(0.5)
    assert signs.probe_change([0.0, 2.0], [0.25, None]) == 0.25
    assert signs.probe_change([None], [1.0]) == 0.0
    assert signs.probe_change([0.1] * 6, [0.1] * 5 + [0.2]) == pytest.approx(0.1)  # equal but for rounding
    assert signs.probe_change([3.0, 3.0], [3.0, 3.25]) == 0.25
    assert signs.probe_change([], []) == 0.0


def test_probes_that_lose_their_score_or_get_one_are_counted():
    assert signs.probe_missing([0.0, 2.0, None, None], [0.5, None, None, 1.0]) == 0.5
    assert signs.probe_missing([0.0], [9.0]) == signs.probe_missing([], []) == 0.0


def test_gold_that_falls_while_the_reward_rises():
    assert signs.gold_drop([1.0, 2.0], [0.8, 0.6], 3) == pytest.approx(0.2)
    assert signs.gold_drop([1.0, 1.5, 2.0], [0.8, 0.9, 0.6], 3) == pytest.approx(0.3)  # from the best
    assert signs.gold_drop([2.0, 1.0], [0.8, 0.6], 3) == 0.0  # both fall: no over-optimisation
    assert signs.gold_drop([1.0, 2.0], [0.6, 0.8], 3) == 0.0
    assert math.isnan(signs.gold_drop([1.0], [0.5], 3))
    # .01 a round is never much within three rounds; means of three: .79 at first, .63 now
    slow = [0.8 - 0.01 * i for i in range(19)]
    assert signs.gold_drop(list(range(19)), slow, 3) == pytest.approx(0.16)
    # one lucky round in the middle: means .5 .5 .8 .8 .8 .5
    assert signs.gold_drop(list(range(8)), [0.5, 0.5, 0.5, 0.5, 1.4, 0.5, 0.5, 0.5], 3) == pytest.approx(0.3)
