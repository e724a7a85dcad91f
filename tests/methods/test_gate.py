import math

import numpy as np
import pytest

from selfplay.config import GateConfig
from selfplay.methods import gate
from selfplay.types import Candidate


def answer(i, tokens, finish="stop", text="x"):
    return Candidate(
        prompt_id=f"p{i}", index=0, text=text, token_ids=list(range(tokens)), logp=-1.0, n_tokens=tokens,
        finish_reason=finish, policy=0,
    )  # fmt: skip


def test_wins_count_ties_half():
    assert gate.wins([1, 2, 3], [0, 2, 4]).tolist() == [1, 0.5, 0]


def test_the_bootstrap_interval_of_a_share():
    """400 of 1,000 wins: standard error √(.4·.6/1000) = .0155, so ± .0304 at 95 %."""
    low, high = gate.bootstrap([1.0] * 400 + [0.0] * 600, 4000, 0.95, seed=0)
    assert low == pytest.approx(0.4 - 0.0304, abs=0.003)
    assert high == pytest.approx(0.4 + 0.0304, abs=0.003)
    assert gate.bootstrap([1.0] * 9, 200, 0.95, 0) == (1.0, 1.0)


def test_the_length_controlled_win_rate_takes_length_out():
    """Wins made with a known logit 0.4 + 2·Δlog length: at equal length σ(.4) = .599, raw much higher for long answers."""
    rng = np.random.default_rng(0)
    champion = np.full(4000, 20.0)
    length = champion * np.exp(rng.normal(0.5, 0.3, 4000))
    logit = 0.4 + 2 * np.log(length / champion)
    won = (rng.random(4000) < 1 / (1 + np.exp(-logit))).astype(float)
    assert won.mean() > 0.75
    assert gate.length_controlled(won, length, champion) == pytest.approx(0.599, abs=0.05)
    assert 0.97 < gate.length_controlled([1.0] * 8, [9] * 8, [9] * 8) <= 1  # separable data have a finite fit
    assert gate.length_controlled([1.0, 0.0], [9, 9], [9, 9]) == pytest.approx(0.5)


def test_distinct_and_kl_by_hand():
    """Bigrams (1,2) (2,1) (1,2) and (1,2): 2 distinct of 4."""
    assert gate.distinct_n([[1, 2, 1, 2], [1, 2], [7]]) == 0.5
    assert gate.distinct_n([[1]]) == 0.0
    assert gate.kl_estimate([-1.0, -2.0], [-2.0, -5.0]) == 2.0


def compare(scores, champion_scores, **changes):
    n = len(scores)
    rows = changes.pop("rows", [answer(i, 10) for i in range(n)])
    return gate.compare(
        rows, [answer(i, 10) for i in range(n)], scores, champion_scores, samples=500, confidence=0.95, seed=0
    ) | {"kl_current": 1.0}  # fmt: skip


def test_unscored_prompts_are_left_out_and_counted():
    m = compare([1.0, math.nan, 1.0], [0.0, 5.0, 0.0])
    assert (m["prompts"], m["unscored"], m["win_rate"], m["reward"], m["reward_champion"]) == (2, 1, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="no prompt has a score"):
        compare([math.nan], [1.0])


RULE = GateConfig()


def test_a_better_candidate_is_promoted():
    verdict = gate.verdict(compare([1.0] * 30, [0.0] * 30), RULE, independent=False)
    assert verdict.promoted
    assert (verdict.reasons, verdict.independent) == ([], False)


def test_a_bound_of_zero_asks_nothing():
    lost = compare([0.0] * 30, [1.0] * 30)
    open_gate = GateConfig(win_rate_lower=0, reward_up=False)
    assert gate.verdict(lost, open_gate, independent=False).promoted
    assert not gate.verdict(lost, GateConfig(win_rate_lower=0.01, reward_up=False), independent=False).promoted


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (compare([1.0, 0.0] * 15, [0.0, 1.0] * 15), "win rate 0.500 with lower bound"),
        (compare([0.1] * 29 + [-9.0], [0.0] * 30), "mean reward -0.203, not above the champion's 0.000"),
        (
            compare([1.0] * 30, [0.0] * 30) | {"kl_current": 99.0},
            "KL to the current policy 99.00 nats an answer, above 30",
        ),
        (compare([1.0] * 30, [0.0] * 30) | {"kl_current": math.nan}, "KL to the current policy nan"),
        (compare([1.0] * 30, [0.0] * 30, rows=[answer(i, 16) for i in range(30)]), "length ratio 1.60"),
        (compare([1.0] * 30, [0.0] * 30, rows=[answer(i, 6) for i in range(30)]), "length ratio 0.60"),
        (
            compare([1.0] * 30, [0.0] * 30, rows=[answer(i, 10, "length" if i < 6 else "stop") for i in range(30)]),
            "20.0% of the answers are cut off",
        ),
    ],
)
def test_each_limit_of_the_gate_is_a_reason(metrics, reason):
    verdict = gate.verdict(metrics, RULE, independent=True)
    assert not verdict.promoted
    assert any(reason in r for r in verdict.reasons)


def test_the_power_of_the_win_rate_rule():
    """At true rate .47 + z·σ the bound lies at .47 on average: half of such candidates pass. p = .6, n: σ = .13/1.96."""
    rule = GateConfig(win_rate_lower=0.47, confidence=0.95)
    n = round(0.24 / ((0.6 - 0.47) / 1.959964) ** 2)
    assert gate.power(n, 0.6, rule) == pytest.approx(0.5, abs=0.01)
    assert gate.power(10_000, 0.6, rule) > 0.999 > 0.03 > gate.power(384, 0.47, rule)
    assert gate.power(10, 1.0, rule) == 1.0 and gate.power(10, 0.1, GateConfig(win_rate_lower=0)) == 1.0
