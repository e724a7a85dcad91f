"""Signs that pairs would teach a length, or to say the same again."""

import itertools
import math

import numpy as np
import pytest

from selfplay.methods import answer_signs, margins
from selfplay.methods.answer_signs import FEWEST, decided_by_length, length_gap, repeated
from selfplay.methods.shaping import repetition


def test_pairs_are_the_highest_against_the_lowest_reward_as_everywhere():
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 4, 200) / 2.0  # many ties
    starts = np.array([0, *sorted(rng.choice(np.arange(1, 200), 39, replace=False)), 200])
    everything = np.ones(200, np.bool_)
    chosen, rejected = answer_signs.base_pairs(rewards, everything, everything, starts)
    expected = [
        (start + found[0], start + found[1])
        for start, end in itertools.pairwise(starts)
        if (found := margins.base_pair(rewards[start:end].tolist())) is not None
    ]
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == expected


def test_an_answer_that_may_not_win_is_no_chosen_one_and_one_without_a_reward_in_no_pair():
    rewards = [9.0, 5.0, 1.0, math.nan, 2.0, 2.0]
    can_win = [False, True, True, True, True, True]
    chosen, rejected = answer_signs.base_pairs(rewards, can_win, np.ones(6, np.bool_), [0, 3, 4, 6])
    assert (chosen.tolist(), rejected.tolist()) == ([1], [2])


def test_the_length_gap_is_the_share_by_which_one_side_is_shorter():
    assert length_gap([20, 20], [80, 80]) == -0.75
    assert length_gap([80, 80], [10, 30]) == 0.75
    assert length_gap([3, 5], [4, 4]) == 0.0
    assert math.isnan(length_gap([], []))


def test_length_decides_where_the_shorter_or_the_longer_answer_always_wins():
    n = FEWEST
    short, long = np.full(n, 3), np.full(n, 9)
    assert (decided_by_length(long, short), decided_by_length(short, long)) == (1.0, -1.0)
    assert decided_by_length(short, short) == 0.5  # equally long ones say nothing
    mixed = np.where(np.arange(n) < n // 4, 3, 9)  # a quarter of the chosen ones is shorter, none equal
    assert decided_by_length(mixed, np.full(n, 5)) == 0.75
    assert math.isnan(decided_by_length(short[1:], long[1:]))  # too few to tell


@pytest.mark.parametrize("ngram", [1, 2, 4])
def test_repetition_of_all_answers_at_a_time_is_that_of_each(ngram):
    rng = np.random.default_rng(1)
    answers = [rng.integers(0, 3, rng.integers(0, 30)).tolist() for _ in range(50)]
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in answers])])
    tokens = np.concatenate([np.array(ids, np.int32) for ids in answers])
    grams = [[tuple(ids[i : i + ngram]) for i in range(len(ids) - ngram + 1)] for ids in answers]
    expected = [1 - len(set(own)) / len(own) if own else 0.0 for own in grams]
    np.testing.assert_allclose(repetition(tokens, starts, ngram), expected, atol=1e-12)
    assert repeated(tokens, starts, ngram) == pytest.approx(np.mean(expected))
    assert repeated([7] * 10, [0, 10], ngram) == pytest.approx(1 - 1 / (11 - ngram))
    assert repeated([1, 2], [0, 2], 4) == 0.0
    assert math.isnan(repeated([], [0], ngram))
