"""Who judges at the gate, what is asked of the rubric, and what is made of both."""

import contextlib
import math

import pytest
from fake_reward import fake
from test_reward_judge import saying

from selfplay.config import RewardSource
from selfplay.errors import InputError, RewardError
from selfplay.evaluation.judge import Judge, dependence, gold_means, require_scores, rewards
from selfplay.rewards.scorer import Scorer
from selfplay.storage import folders
from selfplay.types import Candidate, Prompt, Scored


def scored(reward, **parts):
    return Scored(
        prompt_id="p", index=0, text="x", token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=1, reward=reward,
        reward_parts=parts,
    )  # fmt: skip


def prompt(name="p", **meta):
    messages = [{"role": "user", "content": f"{name}?"}]
    return Prompt(prompt_id=name, messages=messages, prompt_ids=[1], split="heldout", meta=meta)


def answer(prompt, text):
    return Candidate(
        prompt_id=prompt.prompt_id, index=0, text=text, token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=0
    )  # fmt: skip


def scorer(folder, source, role="judge"):
    found = RewardSource.model_validate(source)
    return Scorer(role, [found], None, folder, cache=None, gpus=None, on_event=lambda kind, text: None)


@contextlib.contextmanager
def judging(folder, source, gold=None, max_missing=0.0, dependent=None):
    asked = scorer(folder, source)
    try:
        yield Judge(
            scorer=asked, identities=asked.identities, max_missing=max_missing, gold=gold, gold_name="mine:grade",
            described={"names": ["n"]}, dependent=dependent,
        )  # fmt: skip
    finally:
        asked.stop()


@pytest.mark.parametrize(
    ("configured", "reward", "judge", "expected"),
    [
        (None, ["one/t/float32"], ["one/t/float32"], "the reward that trains judges"),
        ({"model": "same", "heads": {"a": 1}}, ["one/t/float32"], ["two/t/float32"], "has the weights same of the"),
        ({"model": "other"}, ["one/t/float32"], ["two/t/float32"], None),
        # the same weights under another name
        ({"model": "other"}, ["two/t/float32", "one/t/float32"], ["one/u/bfloat16"], "has the weights one of the"),
        ({"model": "other"}, [""], [""], None),  # servers that tell nothing: the configuration is believed
        ({"model": "other"}, None, ["one/t/float32"], None),  # a round that was scored before this was recorded
    ],
)
def test_a_gate_is_independent_where_other_weights_judge(tmp_path, configured, reward, judge, expected):
    trains = scorer(tmp_path, {"model": "same"}, "reward")
    judges = trains if configured is None else scorer(tmp_path, configured)
    path = tmp_path / "reward.json"
    if reward is not None:
        folders.write_json(path, {"identities": reward})
    found = dependence(path, trains, judges, judge)
    if expected is None:
        assert found is None
    else:
        assert found.startswith("gate not independent: ") and expected in found


@pytest.mark.service
def test_a_pairwise_judge_compares_candidate_and_champion(tmp_path):
    """It likes the longer answer; at equal texts it is not asked: a tie."""

    def said(shown):
        a, b = shown["answer A"], shown["answer B"]
        return "VERDICT: A" if len(a) > len(b) else "VERDICT: B"

    prompts = [prompt(p) for p in "pqr"]
    candidate, champion = (
        [answer(p, text) for p, text in zip(prompts, texts, strict=True)]
        for texts in (["long answer", "short", "same"], ["short", "longer answer", "same"])
    )
    with (
        fake(default=saying(said)) as chat,
        judging(tmp_path, {"chat_judge": {"url": [chat.url], "model": "m", "mode": "pairwise"}}) as judge,
    ):
        ours, theirs = judge.both(prompts, candidate, champion, lambda where: None)
    assert [a.reward for a in ours] == [1.0, 0.0, 0.5] and [b.reward for b in theirs] == [0.0, 1.0, 0.5]
    assert [a.text for a in ours] == [c.text for c in candidate]
    assert [b.text for b in theirs] == [c.text for c in champion]


def test_the_rubric_is_asked_for_every_answer_and_gets_an_empty_meta_where_a_prompt_has_none(tmp_path):
    asked = []

    def gold(messages, text, meta):
        asked.append((messages[-1]["content"], text, meta))
        return {"total": 1, "content": 0.5} if meta else {"total": 0.25}

    prompts = [prompt("p", answer=4), prompt("q")]
    ours, theirs = ([answer(p, text) for p in prompts] for text in ("4", "5"))
    with fake() as server, judging(tmp_path, {"url": [server.url]}, gold) as judge:
        found, champion = judge.both(prompts, ours, theirs, lambda where: None)
    assert [a.reward_parts for a in found] == [a.reward_parts for a in champion]
    assert [a.reward_parts for a in found] == [{"total": 1.0, "content": 0.5}, {"total": 0.25}]
    assert sorted(asked, key=str) == [
        ("p?", "4", {"answer": 4}), ("p?", "5", {"answer": 4}), ("q?", "4", {}), ("q?", "5", {})
    ]  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        lambda *_: {"content": 1.0},
        lambda *_: 1 / 0,
        lambda *_: {"total": "much"},
        lambda *_: {"total": math.nan},
        lambda messages, text, meta: {"total": meta["answer"]},
    ],
    ids=["no total", "raises", "no number", "not finite", "needs a meta"],
)
def test_a_fault_of_the_rubric_is_named_with_its_prompt(tmp_path, broken):
    with (
        fake() as server,
        judging(tmp_path, {"url": [server.url]}, broken) as judge,
        pytest.raises(InputError, match=r"evaluate\.gold \(mine:grade\) failed on prompt p") as error,
    ):
        judge.both([prompt()], [answer(prompt(), "4")], [answer(prompt(), "5")], lambda where: None)
    assert "mend the rubric" in error.value.hint and "empty meta" in error.value.hint


def test_without_a_rubric_answers_have_no_parts(tmp_path):
    with fake() as server, judging(tmp_path, {"url": [server.url]}) as judge:
        found, _ = judge.both([prompt(answer=4)], [answer(prompt(), "1")], [answer(prompt(), "2")], lambda where: None)
    assert [a.reward_parts for a in found] == [{}]


def test_means_of_a_rubric_are_over_the_answers_that_it_grades():
    """Totals .5 and 1.0; a part that not every answer has is left out."""
    answers = [scored(1.0, total=0.5, content=0.25), scored(2.0, total=1.0, content=0.75, tone=1.0), scored(3.0)]
    assert gold_means("gold", answers) == {"gold_total": 0.75, "gold_content": 0.5}
    assert gold_means("gold", answers[:1], "_champion") == {"gold_total_champion": 0.5, "gold_content_champion": 0.25}
    assert gold_means("gold", [scored(1.0)]) == {}


def test_one_prompt_with_both_scores_is_enough_to_compare():
    nan = math.nan
    assert rewards([scored(1.5), scored(None)])[0] == 1.5 and math.isnan(rewards([scored(None)])[0])
    require_scores("judge", [nan, 1.0], [1.0, 2.0])
    with pytest.raises(RewardError, match="the judge scored no prompt of the gate for both policies") as error:
        require_scores("judge", [nan, 1.0], [1.0, nan])
    assert "same command again" in error.value.hint
