"""Which prompts are the easier ones (arXiv 2510.05534)."""

import math

import numpy as np

from selfplay.methods.difficulty import easiest, mean_rewards


def test_a_prompt_is_as_easy_as_the_mean_of_its_rewards():
    rewards = [1.0, 3.0, math.nan, math.nan, -2.0, 5.0, 0.0]
    means = mean_rewards(rewards, [0, 3, 4, 6, 7])
    np.testing.assert_array_equal(means, [2.0, math.nan, 1.5, 0.0])
    assert easiest(means, 1.0).tolist() == [True, False, True, True]  # one without rewards is never easy
    assert easiest(means, 0.67).tolist() == [True, False, True, False]
    assert easiest(means, 0.01).tolist() == [True, False, False, False]  # never none


def test_of_equally_easy_prompts_the_first_counts():
    assert easiest([1.0, 1.0, 1.0, 1.0], 0.5).tolist() == [True, True, False, False]
    assert easiest([], 0.5).tolist() == []
