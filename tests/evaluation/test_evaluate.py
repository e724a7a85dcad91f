"""The parts of the stage that need no engine: gold scores, and the comparison with the initial policy, by hand."""

from types import SimpleNamespace

import pytest

from selfplay.errors import InputError
from selfplay.evaluation import evaluate
from selfplay.types import Prompt, Scored


def scored(reward, **parts):
    return Scored(
        prompt_id="p", index=0, text="x", token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=1, reward=reward,
        reward_parts=parts,
    )  # fmt: skip


def prompt(**meta):
    return Prompt(
        prompt_id="p", messages=[{"role": "user", "content": "?"}], prompt_ids=[1], split="heldout", meta=meta
    )


def test_means_of_a_rubric_are_over_the_answers_that_it_grades():
    """Totals .5 and 1.0; a part that not every answer has is left out."""
    answers = [scored(1.0, total=0.5, content=0.25), scored(2.0, total=1.0, content=0.75, tone=1.0), scored(3.0)]
    assert evaluate._gold("gold", answers) == {"gold_total": 0.75, "gold_content": 0.5}
    assert evaluate._gold("gold", answers[:1], "_champion") == {
        "gold_total_champion": 0.5,
        "gold_content_champion": 0.25,
    }
    assert evaluate._gold("gold", [scored(1.0)]) == {}


def test_the_audit_counts_ties_half_and_leaves_out_what_has_no_score():
    """Rewards 2 > 1, 1 = 1, none: win rate (1 + ½) / 2, means over the two. Gold totals .9 > .5, .5 = .5, .2 < .8."""
    ours = [scored(2.0, total=0.9), scored(1.0, total=0.5), scored(None, total=0.2)]
    initial = [scored(1.0, total=0.5), scored(1.0, total=0.5), scored(9.0, total=0.8)]
    found = evaluate._audit(ours, initial)
    assert found["audit_win_rate"] == 0.75
    assert (found["audit_reward"], found["audit_reward_initial"]) == (1.5, 1.0)
    assert found["audit_gold_win_rate"] == pytest.approx(0.5)
    assert found["audit_gold_total"] == pytest.approx(1.6 / 3) and found["audit_gold_total_initial"] == pytest.approx(
        0.6
    )
    assert evaluate._audit([scored(None)], [scored(1.0)]) == {}
    assert "audit_gold_win_rate" not in evaluate._audit([scored(1.0)], [scored(0.0)])


def test_a_rubric_is_asked_where_there_are_gold_answers_and_its_faults_are_named():
    asked = []

    def gold(messages, text, meta):
        asked.append((messages[-1]["content"], text, meta))
        return {"total": 1, "content": 0.5}

    r = SimpleNamespace(
        run=SimpleNamespace(gold=gold), config=SimpleNamespace(evaluate=SimpleNamespace(gold="mine:grade"))
    )
    assert evaluate._grade(r, prompt(answer=4), "four") == {"total": 1.0, "content": 0.5}
    assert asked == [("?", "four", {"answer": 4})]
    assert evaluate._grade(r, prompt(), "four") == {} and len(asked) == 1
    for broken in (lambda *_: {"content": 1.0}, lambda *_: 1 / 0, lambda *_: {"total": "much"}):
        r.run.gold = broken
        with pytest.raises(InputError, match=r"evaluate\.gold \(mine:grade\) failed on prompt p") as error:
            evaluate._grade(r, prompt(answer=4), "four")
        assert "mend the rubric" in error.value.hint
    r.run.gold = None
    assert evaluate._grade(r, prompt(answer=4), "four") == {}


def test_the_audit_set_comes_every_so_many_rounds_and_is_always_the_same():
    settings = SimpleNamespace(audit_every=3, audit_prompts=4, prompts=6)
    pool = {f"p{i}": i for i in range(20)}

    def r(index):
        prompts = SimpleNamespace(read=lambda ids: [pool[i] for i in ids])
        run = SimpleNamespace(ids=lambda split: list(pool), prompts=prompts)
        config = SimpleNamespace(evaluate=settings, run=SimpleNamespace(seed=1))
        return SimpleNamespace(index=index, run=run, config=config, seed=lambda *parts: f"{index} {parts}")

    assert evaluate.audit_prompts(r(1)) == evaluate.audit_prompts(r(2)) == []
    assert evaluate.audit_prompts(r(3)) == evaluate.audit_prompts(r(6)) and len(evaluate.audit_prompts(r(3))) == 4
    assert evaluate.gate_prompts(r(3)) == evaluate.gate_prompts(r(3)) != evaluate.gate_prompts(r(4))
    assert len(evaluate.gate_prompts(r(4))) == 6
    settings.audit_every = 0
    assert evaluate.audit_prompts(r(3)) == []
