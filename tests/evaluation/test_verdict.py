"""The gate's metrics of two policies' answers, and its limits."""

import math

import pytest

from selfplay.config import GateConfig
from selfplay.evaluation import verdict as gate
from selfplay.types import Candidate


def answer(i, tokens, finish="stop", text="x"):
    return Candidate(
        prompt_id=f"p{i}", index=0, text=text, token_ids=list(range(tokens)), logp=-1.0, n_tokens=tokens,
        finish_reason=finish, policy=0,
    )  # fmt: skip


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
    found = gate.verdict(compare([1.0] * 30, [0.0] * 30), RULE, independent=False)
    assert found.promoted
    assert (found.reasons, found.independent) == ([], False)


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
    found = gate.verdict(metrics, RULE, independent=True)
    assert not found.promoted and found.independent
    assert any(reason in r for r in found.reasons)
