"""Base pairs of one prompt, by hand."""

import math

from pairs_world import base, response

from selfplay.config import PairsConfig
from selfplay.methods import margins
from selfplay.pairs.base import base_pairs, every_pair, implicit_reward
from selfplay.pairs.selection import ADVICE, REASONS, advice, metrics, select, why_none


def test_a_base_pair_is_the_highest_against_the_lowest_reward():
    """Margins by hand: explicit 3 − (−1) = 4; r̂_w = −6/2 = −3, r̂_l = −2/2 = −1, so signed −2 and absolute 2."""
    rows = [response(1.0, index=0), response(3.0, index=1, logp=-6.0), response(-1.0, index=2, logp=-2.0)]
    (pair,), lost = base(rows)
    assert (pair.chosen_index, pair.rejected_index) == (1, 2)
    assert (pair.chosen_reward, pair.rejected_reward, pair.chosen_logp, pair.rejected_logp) == (3.0, -1.0, -6.0, -2.0)
    assert (pair.explicit_margin, pair.implicit_margin, pair.implicit_signed) == (4.0, 2.0, -2.0)
    assert not any(lost.values())


def test_implicit_rewards_of_dpo_are_log_ratios_to_the_reference():
    """β = .1: r̂_w = .1·(−6 + 2) = −.4, r̂_l = .1·(−2 + 5) = .3; signed −.7."""
    rows = [
        response(3.0, index=0, logp=-6.0, reference_logp=-2.0),
        response(-1.0, index=1, logp=-2.0, reference_logp=-5.0),
    ]
    (pair,), _ = base(rows, implicit="dpo")
    assert math.isclose(pair.implicit_signed, -0.7) and math.isclose(pair.implicit_margin, 0.7)


def test_cut_off_unscored_and_equal_responses_are_in_no_pair():
    rows = [
        response(9.0, index=0, whole=False),
        response(math.nan, index=1),
        response(math.inf, index=2),
        response(2.0, index=3),
        response(1.0, index=4),
        response(-9.0, index=5, digest=14),  # the tokens of response 4
        response(-8.0, index=6, n_tokens=0),
    ]
    (pair,), _ = base(rows)
    assert (pair.chosen_index, pair.rejected_index) == (3, 4)


def test_prompts_that_give_no_pair_are_counted_by_why():
    cut = [response(1.0, index=0, whole=False), response(2.0, index=1, whole=False)]
    assert base(cut)[1]["prompts_cut_off"] == 1
    same = [response(1.0, index=0, digest=5), response(1.0, index=1, digest=5)]
    assert base(same)[1]["prompts_equal"] == 1
    assert base([response(1.0, index=0), response(1.0, index=1)])[1]["prompts_tied"] == 1
    assert base([response(1.0, index=0), response(math.nan, index=1)])[1]["prompts_unscored"] == 1


def test_a_round_without_pairs_says_what_became_of_its_prompts():
    lost = base([response(1.0, index=0), response(1.0, index=1)])[1] + base([response(1.0, whole=False)])[1]
    found = metrics(base([response(1.0, index=0), response(1.5, index=1)], noise=1.0)[0], lost)
    said = ": 1 prompts with every answer cut off, 1 with equal rewards, 1 margins within the reward's noise"
    assert why_none(found) == said
    assert why_none({"base": 3.0, "prompts_tied": 0.0}) == ""
    assert base([])[1].keys() == {name for name in REASONS if name.startswith("prompts")}  # each has its words
    assert REASONS.keys() == ADVICE.keys()


def test_what_to_change_follows_from_what_most_prompts_were_lost_to():
    assert advice({"prompts_cut_off": 3.0, "prompts_tied": 2.0}, 0.7) == ADVICE["prompts_cut_off"]
    assert advice({"prompts_cut_off": 2.0, "prompts_tied": 3.0}, 0.7) == ADVICE["prompts_tied"]
    assert advice({"base": 9.0, "dropped_noise": 9.0}, 0.1) == ADVICE["dropped_noise"]
    assert advice({"prompts_unscored": 9.0}, 0.2) == ADVICE["prompts_unscored"]
    too_few_are_whole = advice({"prompts_unscored": 9.0}, 0.6)
    assert too_few_are_whole == ADVICE["prompts_cut_off"]
    assert advice({"base": 0.0}, 0.0) == ""


def test_a_margin_within_the_rewards_noise_is_no_pair():
    made, _ = base([response(1.0, index=0), response(1.0 + 1e-6, index=1)], noise=1e-4)
    assert [p.dropped_because for p in made] == ["noise"]
    kept = select(made, PairsConfig(), 0)
    assert not any(p.kept_because for p in kept)
    assert metrics(kept, base_pairs([], PairsConfig(), 0, 0.1)[1])["dropped_noise"] == 1


def test_cut_off_responses_can_be_the_rejected_one_and_never_the_chosen_one():
    """Whole: 1, 2. Cut off: 9, −3. By default 2 against 1; with cut-offs 2 against −3, not 9. Where only a cut-off
    response is better than another, or none is whole, there is no pair."""
    rows = [response(1.0, index=0), response(2.0, index=1), response(9.0, index=2, whole=False)]
    rows.append(response(-3.0, index=3, whole=False))

    def made(rows):
        found, lost = base(rows, cut_off="reject")
        return [(p.chosen_index, p.rejected_index) for p in found], {why for why, n in lost.items() if n}

    assert [(p.chosen_index, p.rejected_index) for p in base(rows)[0]] == [(1, 0)]
    assert made(rows) == ([(1, 3)], set())
    assert made([rows[0], rows[2]]) == ([], {"prompts_tied"})
    assert made(rows[2:]) == ([], {"prompts_cut_off"})


def test_a_pair_that_an_ensemble_disputes_is_dropped_and_has_no_part_in_the_statistics():
    prompts = [
        (name, [response(2.0, index=0, disagreement=first), response(0.0, index=1, disagreement=second)])
        for name, first, second in (("calm", 0.5, 0.1), ("disputed", 0.1, 0.6))
    ]
    made, _ = base_pairs(prompts, PairsConfig(max_disagreement=0.5), 0.0, 0.1)
    assert [p.dropped_because for p in made] == [None, "disagreement"]
    selected = select(made, PairsConfig(keep=1.0), 0)
    assert [(p.kept_because, p.potential is None) for p in selected] == [("base", False), (None, True)]
    assert metrics(selected, base_pairs([], PairsConfig(), 0, 0.1)[1])["dropped_disagreement"] == 1
    assert [p.dropped_because for p in base_pairs(prompts, PairsConfig(), 0.0, 0.1)[0]] == [None, None]


def test_every_pair_of_a_prompt_is_clear_of_the_noise_or_the_base_pair_stands_alone():
    """Widest margin 8, so at least 2: all but 0 against 1. Above a noise of 7.5 there is one, above 9 none."""
    rows = [response(reward, index=i) for i, reward in enumerate((8.0, 7.0, 0.0))]
    (pair,), _ = base(rows)
    implicit = implicit_reward("simpo", 0.1)

    def found(noise):
        made = every_pair(pair, rows, PairsConfig(), noise, implicit)
        return [(p.chosen_index, p.rejected_index) for p in made]

    assert (found(0.0), found(7.5)) == ([(0, 2), (1, 2)], [(0, 2)])
    assert every_pair(pair, rows, PairsConfig(), 9.0, implicit) == [pair]


def test_ordered_pairs_leave_out_neighbours_in_rank():
    """Widest margin 8, so at least 2: 0 beats 1 by 1 only."""
    assert margins.ordered_pairs([8.0, 7.0, 0.0]) == [(0, 2), (1, 2)]
    assert margins.ordered_pairs([1.0, 1.0]) == []
    assert margins.ordered_pairs([]) == []


def test_the_rejected_response_may_be_the_one_nearest_to_two_sigma_below_the_mean():
    """Of 19 rewards of 0 … 18 and one of −30: μ = 7.05, σ = 9.97 (population), μ − 2σ = −12.9, and 0 is nearest to it."""
    rewards = [float(i) for i in range(19)] + [-30.0]
    responses = [response(reward, index=i) for i, reward in enumerate(rewards)]
    assert (pair := base(responses)[0][0]).rejected_index == 19
    assert pair.chosen_index == 18
    found = base(responses, rejected="two_sigma")[0][0]
    assert (found.chosen_index, found.rejected_index, found.explicit_margin) == (18, 0, 18.0)
    few = [response(reward, index=i) for i, reward in enumerate([1.0, 5.0, 2.0, 4.0])]
    assert base(few, rejected="two_sigma")[0] == base(few)[0]  # of four rewards none is further down than √3 σ


def test_the_nearest_to_two_sigma_is_below_the_chosen_one_that_is_whole():
    """The highest reward was cut off: the chosen one has 1.0, and only 0.5 is below it."""
    responses = [response(9.0, index=0, whole=False), response(1.0, index=1), response(0.5, index=2, whole=False)]
    found = base(responses, rejected="two_sigma", cut_off="reject")[0][0]
    assert (found.chosen_index, found.rejected_index) == (1, 2)
    lowest = [response(9.0, index=0, whole=False), response(0.5, index=1)]
    pairs, lost = base(lowest, rejected="two_sigma", cut_off="reject")
    assert pairs == [] and lost["prompts_tied"] == 1
