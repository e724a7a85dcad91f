import dataclasses
import math

import numpy as np

from selfplay.config import PairsConfig
from selfplay.methods import margins
from selfplay.pairs import selection as pairs
from selfplay.types import Prompt, Scored


def prompt(name="p"):
    return Prompt(prompt_id=name, messages=[{"role": "user", "content": name}], prompt_ids=[1, 2], split="train")


def scored(reward, *, name="p", index=0, ids=None, logp=-4.0, finish="stop"):
    ids = [10 + index, 2] if ids is None else ids
    return Scored(
        prompt_id=name, index=index, text=f"answer {index}", token_ids=ids, logp=logp, n_tokens=len(ids),
        finish_reason=finish, policy=0, reward=reward,
    )  # fmt: skip


def base(rows, noise=0.0):
    return pairs.base_pairs([prompt()], {"p": rows}, noise, 0.1)


def test_a_base_pair_is_the_highest_against_the_lowest_reward():
    """Margins by hand: explicit 3 − (−1) = 4; r̂_w = −6/2 = −3, r̂_l = −2/2 = −1, so signed −2 and absolute 2."""
    rows = [scored(1.0, index=0), scored(3.0, index=1, logp=-6.0), scored(-1.0, index=2, logp=-2.0)]
    (pair,), lost = base(rows)
    assert (pair.chosen_index, pair.rejected_index) == (1, 2)
    assert (pair.explicit_margin, pair.implicit_margin, pair.implicit_signed) == (4.0, 2.0, -2.0)
    assert not any(lost.values())


def test_implicit_rewards_of_dpo_are_log_ratios_to_the_reference():
    """β = .1: r̂_w = .1·(−6 + 2) = −.4, r̂_l = .1·(−2 + 5) = .3; signed −.7."""
    rows = [scored(3.0, index=0, logp=-6.0), scored(-1.0, index=1, logp=-2.0)]
    rows = [dataclasses.replace(r, reference_logp=logp) for r, logp in zip(rows, (-2.0, -5.0), strict=True)]
    (pair,), _ = base(rows)
    assert math.isclose(pair.implicit_signed, -0.7) and math.isclose(pair.implicit_margin, 0.7)


def test_cut_off_unscored_and_equal_responses_are_in_no_pair():
    rows = [
        scored(9.0, index=0, finish="length"),
        scored(None, index=1),
        scored(float("nan"), index=2),
        scored(2.0, index=3),
        scored(1.0, index=4),
        scored(-9.0, index=5, ids=[14, 2]),  # the tokens of response 4
        scored(-8.0, index=6, ids=[]),
    ]
    (pair,), _ = base(rows)
    assert (pair.chosen_index, pair.rejected_index) == (3, 4)


def test_prompts_that_give_no_pair_are_counted_by_why():
    cut = [scored(1.0, index=0, finish="length"), scored(2.0, index=1, finish="length")]
    assert base(cut)[1]["prompts_cut_off"] == 1
    same = [scored(1.0, index=0, ids=[5, 2]), scored(1.0, index=1, ids=[5, 2])]
    assert base(same)[1]["prompts_equal"] == 1
    assert base([scored(1.0, index=0), scored(1.0, index=1)])[1]["prompts_tied"] == 1
    assert base([scored(1.0, index=0), scored(None, index=1)])[1]["prompts_unscored"] == 1


def test_a_round_without_pairs_says_what_became_of_its_prompts():
    lost = base([scored(1.0, index=0), scored(1.0, index=1)])[1] + base([scored(1.0, index=0, finish="length")])[1]
    found = pairs.metrics(base([scored(1.0, index=0), scored(1.5, index=1)], noise=1.0)[0], lost)
    said = ": 1 prompts with every answer cut off, 1 with equal rewards, 1 margins within the reward's noise"
    assert pairs.why_none(found) == said
    assert pairs.why_none({"base": 3.0, "prompts_tied": 0.0}) == ""
    assert base([])[1].keys() == {name for name in pairs.NONE if name.startswith("prompts")}  # each has its words


def test_a_margin_within_the_rewards_noise_is_no_pair():
    made, _ = base([scored(1.0, index=0), scored(1.0 + 1e-6, index=1)], noise=1e-4)
    assert [p.dropped_because for p in made] == ["noise"]
    kept = pairs.select(made, PairsConfig(), [], 0)
    assert not any(p.kept_because for p in kept)
    assert pairs.metrics(kept, pairs.base_pairs([], {}, 0, 0.1)[1])["dropped_noise"] == 1


def test_cut_off_responses_can_be_the_rejected_one_and_never_the_chosen_one():
    """Whole: 1, 2. Cut off: 9, −3. By default 2 against 1; with cut-offs 2 against −3, not 9. Where only a cut-off
    response is better than another, or none is whole, there is no pair."""
    rows = [scored(1.0, index=0), scored(2.0, index=1), scored(9.0, index=2, finish="length")]
    rows.append(scored(-3.0, index=3, finish="length"))

    def made(rows):
        found, lost = pairs.base_pairs([prompt()], {"p": rows}, 0.0, 0.1, cut_off="reject")
        return [(p.chosen_index, p.rejected_index) for p in found], {why for why, n in lost.items() if n}

    assert [(p.chosen_index, p.rejected_index) for p in base(rows)[0]] == [(1, 0)]
    assert made(rows) == ([(1, 3)], set())
    assert made([rows[0], rows[2]]) == ([], {"prompts_tied"})
    assert made(rows[2:]) == ([], {"prompts_cut_off"})


def test_a_pair_that_an_ensemble_disputes_is_dropped_and_has_no_part_in_the_statistics():
    def rows(name, disagreement):
        made = [scored(2.0, index=0, name=name), scored(0.0, index=1, name=name)]
        return [
            dataclasses.replace(r, reward_parts={"disagreement": d}) for r, d in zip(made, disagreement, strict=True)
        ]

    prompts = [prompt("calm"), prompt("disputed")]
    candidates = {"calm": rows("calm", (0.5, 0.1)), "disputed": rows("disputed", (0.1, 0.6))}
    made, _ = pairs.base_pairs(prompts, candidates, 0.0, 0.1, max_disagreement=0.5)
    assert [p.dropped_because for p in made] == [None, "disagreement"]
    selected = pairs.select(made, PairsConfig(keep=1.0), [], 0)
    assert [(p.kept_because, p.potential is None) for p in selected] == [("base", False), (None, True)]
    assert pairs.metrics(selected, pairs.base_pairs([], {}, 0, 0.1)[1])["dropped_disagreement"] == 1
    assert [p.dropped_because for p in pairs.base_pairs(prompts, candidates, 0.0, 0.1)[0]] == [None, None]


def many(n, rng):
    rows = []
    for i in range(n):
        a, b = (
            scored(float(rng.normal()), index=0, logp=-float(rng.uniform(1, 9))),
            scored(float(rng.normal()), index=1),
        )
        rows += pairs.base_pairs([prompt(f"p{i}")], {f"p{i}": [a, b]}, 0.0, 0.1)[0]
    return rows


def test_selection_keeps_the_configured_share_and_says_why():
    made = many(100, np.random.default_rng(0))
    for selection in ("potential", "explicit", "implicit", "random"):
        chosen = pairs.select(made, PairsConfig(selection=selection, keep=0.4), [], seed=1)
        assert sum(p.kept_because == "base" for p in chosen) == 40
        assert sum(p.dropped_because == selection for p in chosen) == 60
        assert all(p.potential is not None for p in chosen)
    explicit = pairs.select(made, PairsConfig(selection="explicit"), [], 1)
    assert min(p.explicit_margin for p in explicit if p.kept_because) > max(
        p.explicit_margin for p in explicit if p.dropped_because
    )
    random = [
        [bool(p.kept_because) for p in pairs.select(made, PairsConfig(selection="random"), [], s)] for s in (1, 1, 2)
    ]
    assert random[0] == random[1] != random[2]


def test_the_signed_option_ranks_a_pair_that_the_policy_has_the_wrong_way_round_first():
    """Two pairs with equal explicit margins; the policy prefers the rejected response in the first one."""
    wrong = base([scored(1.0, index=0, logp=-8.0), scored(0.0, index=1, logp=-2.0)])[0]
    right = base([scored(1.0, index=0, logp=-2.0), scored(0.0, index=1, logp=-7.0)])[0]
    rows = [*wrong, *right]
    absolute = pairs.select(rows, PairsConfig(keep=0.5), [], 0)
    signed = pairs.select(rows, PairsConfig(keep=0.5, signed=True), [], 0)
    assert [bool(p.kept_because) for p in absolute] == [False, True]
    assert [bool(p.kept_because) for p in signed] == [True, False]


def test_a_small_set_uses_the_statistics_of_recent_rounds():
    rng = np.random.default_rng(0)
    few, recent = many(5, rng), many(200, rng)
    alone, together = pairs.select(few, PairsConfig(), [], 0), pairs.select(few, PairsConfig(), recent, 0)
    everything = [p.explicit_margin for p in [*few, *recent]], [p.implicit_margin for p in [*few, *recent]]
    m = few[0]
    by_hand = (m.explicit_margin - np.mean(everything[0])) / np.std(everything[0]) - (
        m.implicit_margin - np.mean(everything[1])
    ) / np.std(everything[1])
    assert math.isclose(together[0].potential, by_hand)
    assert alone[0].potential != together[0].potential


def test_a_non_finite_margin_is_set_aside():
    rows = many(3, np.random.default_rng(1)) + base([scored(1.0, index=0, logp=-math.inf), scored(0.0, index=1)])[0]
    chosen = pairs.select(rows, PairsConfig(keep=1.0), [], 0)
    assert [p.dropped_because for p in chosen] == [None, None, None, "nonfinite"]


def test_ordered_pairs_leave_out_neighbours_in_rank():
    """Widest margin 8, so at least 2: 0 beats 1 by 1 only."""
    assert margins.ordered_pairs([8.0, 7.0, 0.0]) == [(0, 2), (1, 2)]
    assert margins.ordered_pairs([1.0, 1.0]) == []
    assert margins.ordered_pairs([]) == []
