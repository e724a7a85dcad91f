"""Shaping by hand-derived values."""

import math

import numpy as np
import pytest

from selfplay.methods import shaping


def test_a_group_loses_its_mean_and_what_has_no_reward_counts_for_nothing():
    got = shaping.within([1.0, 3.0, 10.0, math.nan, 14.0], ["a", "a", "b", "b", "b"])
    np.testing.assert_allclose(got, [-1, 1, -2, np.nan, 2])


def test_the_slope_is_that_within_prompts():
    """Prompt a: lengths 1, 3 with rewards 0, 4, so 2 a token. Prompt b: lengths 10, 12, rewards −20, −16, 2 a token too.
    Over all four the line falls, because b's answers are longer and worse. What has no reward does not shift a mean."""
    rewards, lengths, groups = [0.0, 4.0, -20.0, -16.0], [1, 3, 10, 12], ["a", "a", "b", "b"]
    assert np.polyfit(lengths, rewards, 1)[0] < 0
    assert shaping.length_slope(rewards, lengths, groups) == pytest.approx(2.0)
    assert shaping.length_slope([*rewards, math.nan], [*lengths, 500], [*groups, "a"]) == pytest.approx(2.0)
    assert shaping.length_slope([1.0, 2.0], [5, 5], ["a", "a"]) == 0.0
    assert shaping.length_slope([1.0, 2.0], [5, 9], ["a", "b"]) == 0.0


def test_length_control_takes_the_slope_out_and_leaves_the_mean():
    """The slope is 2 and the mean length 6.5: the terms are −2·(n − 6.5)."""
    rewards, lengths, groups = [0.0, 4.0, -20.0, -16.0], [1, 3, 10, 12], ["a", "a", "b", "b"]
    term = shaping.length_control(rewards, lengths, groups, 1.0)
    np.testing.assert_allclose(term, [11, 7, -7, -11])
    assert shaping.length_slope(rewards + term, lengths, groups) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(shaping.length_control(rewards, lengths, groups, 0.5), term / 2)
    np.testing.assert_array_equal(shaping.length_control([math.nan], [3], ["a"], 1.0), [0.0])


def test_length_control_decides_nothing_between_answers_with_the_same_reward():
    """Right (1) or wrong (0), and the longer answers are right a little more often: no right answer gets above another."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 100, 400)
    rewards = (rng.random(400) < 0.3 + 0.004 * lengths).astype(float)
    groups = np.repeat(np.arange(50), 8).tolist()
    shaped = rewards + shaping.length_control(rewards, lengths, groups, 1.0)
    for group in range(50):
        own = slice(8 * group, 8 * group + 8)
        for value in (0.0, 1.0):
            assert len(set(shaped[own][rewards[own] == value])) <= 1
    assert shaped.mean() == pytest.approx(rewards.mean())
    assert abs(shaping.length_slope(shaped, lengths, groups)) < shaping.length_slope(rewards, lengths, groups)


def test_penalties():
    np.testing.assert_allclose(shaping.length_penalty([5, 10, 13], 0.1, 10), [0, 0, -0.3])
    np.testing.assert_allclose(shaping.cut_off_penalty(["stop", "length"], 2.0), [0, -2])
    # 1 2 1 2 1: bigrams 12 21 12 21, two of four occurred before. No bigram of one response counts in another.
    tokens, starts = [1, 2, 1, 2, 1, 1, 2, 3, 1], [0, 5, 8, 9]
    np.testing.assert_array_equal(shaping.repetition(tokens, starts, 2), [0.5, 0, 0])
    assert shaping.repetition([], [0], 2).shape == (0,)
    np.testing.assert_allclose(shaping.repetition([7, 7, 7, 1, 2, 3], [0, 3, 6], 1), [2 / 3, 0])


def test_repetition_beyond_its_length_does_not_depend_on_length():
    """Two prompts whose answers repeat .001 a token, and one answer of each .1 more; a loop that was cut off has no say."""
    lengths = np.array([10, 50, 90, 160, 20, 60, 100, 140])
    groups = list("aaaabbbb")
    shares = 0.001 * lengths + np.array([0, 0.1, 0, 0.9, 0, 0.1, 0, 0])
    whole = np.array([True, True, True, False, True, True, True, True])
    found = shaping.beyond_length(shares, lengths, groups, whole)
    assert abs(shaping.length_slope(np.where(whole, found, np.nan), lengths, groups)) < 1e-12
    assert found[3] > 0.8 > found[1] > found[0] and found[1] > found[2]
    np.testing.assert_allclose(shaping.beyond_length(shares, lengths, groups, np.zeros(8, bool)), shares)
