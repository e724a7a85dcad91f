"""The stage `guard` of a round among others: which rounds it is compared with, and what stays of a stop."""

import math

import numpy as np
import pytest
from steps_world import LINE, Opened, write_sampled

from selfplay.errors import GuardError, StageFailed
from selfplay.rewards.early_signs import NAMES
from selfplay.rounds.stages import GUARD, SCORE
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Prompt, Reward

PROMPTS = [Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in "pq"]
ANSWERS = [
    Candidate(
        prompt_id="pq"[i // 2], index=i % 2, text="x" * i, token_ids=[*range(5, 6 + i), 2], logp=-1.0, n_tokens=2 + i,
        finish_reason="stop", policy=0,
    )
    for i in range(4)
]  # fmt: skip
"""Four answers of 2, 3, 4, 5 tokens, two to each prompt."""


@pytest.fixture
def run(tmp_path):
    return Opened(tmp_path, "guard.history=2")


def write(run, index, rewards, *, by=None, gold=None, disagreement=None, **metrics):
    """A scored round, with these rewards, metrics of the stage `score`, and gold score of the policy that sampled."""
    steps = run.steps(index)
    write_sampled(steps, PROMPTS, ANSWERS)
    parts = {} if disagreement is None else {"disagreement": disagreement}

    def score(out, line):
        rows = [
            Reward(prompt_id=c.prompt_id, index=c.index, reward=reward, reward_parts=parts)
            for c, reward in zip(ANSWERS, rewards, strict=True)
        ]
        tables.write_rows(out / "scored.parquet", rows, Reward)
        folders.write_json(out / "reward.json", {} if by is None else {"names": [by]})
        return metrics

    steps.frame.do(SCORE, score)
    if gold is not None:
        run.store.record_stage(index, "evaluate", 1.0, {"gold_total_champion": gold})
    return steps


def test_numbers_of_a_round_and_those_before_it(run, tmp_path):
    """Rewards 0, 1 and 1, 1: one of two pairs tied, 3 of 4 at the top. Round 3 had 0 0 1 1: half of ours lie above 0 and
    a quarter below, so the distance at 0 is .5 − .25. Round 1 is too old. Gold fell from .8 to .6 while the reward rose."""
    write(run, 1, [9.0] * 4, disagreement=0.25, reward_mean=9.0, gold=0.9)
    write(run, 3, [0.0, 0.0, 1.0, 1.0], disagreement=0.25, reward_mean=1.0, gold=0.8)
    run.store.record_stage(4, "score", 1.0, {"reward_mean": 2.0})  # its artifacts were deleted
    run.store.record_stage(4, "evaluate", 1.0, {"gold_total_champion": 0.6})
    steps = write(run, 5, [0.0, 1.0, 1.0, 1.0], disagreement=0.25, probe_change=0.001)
    found = {name: value for name, value in steps.guard(tmp_path, LINE).items() if name not in NAMES}
    assert math.isnan(found.pop("probe_missing"))
    # prompt p: rewards −.5 .5 and lengths −.5 .5 around their means; prompt q: 0 0 and −.5 .5: 0.5 / √(.5 · 1)
    assert found.pop("length_correlation") == pytest.approx(math.sqrt(0.5))
    assert found.pop("gold_drop") == pytest.approx(0.2)
    assert found == {"ties": 0.5, "saturation": 0.75, "shift": 0.25, "disagreement": 0.25, "probe_change": 0.001}


def test_rounds_that_another_reward_scored_are_no_measure(run, tmp_path):
    for index, (rewards, name) in enumerate([([9.0] * 4, "b"), ([0.0] * 4, "a"), ([0.0] * 4, "a")], 1):
        steps = write(run, index, rewards, by=name, reward_mean=float(index), gold=1.0 / index)
    found = steps.guard(tmp_path, LINE)
    assert found["shift"] == 0.0 and math.isnan(found["gold_drop"])


def test_a_round_that_was_given_up_is_no_measure(tmp_path):
    run = Opened(tmp_path)
    usual = [0.0, 1.0, 2.0, 3.0]
    for index, rewards in {1: usual, 2: [50.0] * 4, 3: usual, 4: usual}.items():
        run.store.open_round(index, 0, (0, 0), "", {})
        mean, gold = {1: (1.0, 1.5), 2: (9.0, 2.5), 3: (1.1, 0.5), 4: (1.0, None)}[index]
        steps = write(run, index, rewards, reward_mean=mean, gold=gold)
        if index < 4:
            run.store.close_round(index, "cancelled" if index == 2 else "rejected", 0, [])
    found = steps.guard(tmp_path, LINE)
    assert found["shift"] == 0.0 and found["gold_drop"] == pytest.approx(1.0)


def test_a_first_round_has_nothing_to_compare_with(run):
    steps = write(run, 1, [1.0, 2.0, 4.0, 3.0], probe_change=0.0, probe_missing=0.0)
    steps.frame.do(GUARD, steps.guard)
    written = folders.read_json(steps.frame.path("guard/guard.json"))
    assert [written[name] for name in ("shift", "disagreement", "gold_drop")] == [None] * 3
    known = {name: value for name, value in written.items() if value is not None}
    found = {name: v for name, v in run.store.metrics(1).items() if name.startswith("guard/")}
    assert found == {f"guard/{name}": value for name, value in known.items()}
    assert run.warned == [] and run.events(1) == []


def test_of_a_stop_the_signs_stay_in_the_ledger_and_no_stage(tmp_path):
    run = Opened(tmp_path, "guard.saturation={warn: 0.5}", "guard.ties={stop: 0.4}")
    steps = write(run, 1, [0.0, 1.0, 1.0, 1.0])
    with pytest.raises(StageFailed) as error:
        steps.frame.do(GUARD, steps.guard)
    assert isinstance(error.value.__cause__, GuardError)
    signs = ["ties.stop)", "saturation.warn)", "length_correlation.warn)"]
    assert [text.split("guard.")[1] for text in run.warned] == signs
    assert all(text.startswith("warning: round 1: guard: ") for text in run.warned)
    *warned, stopped, failed = run.events(1)
    assert [text.split("guard.")[1] for text in warned] == signs
    assert stopped.startswith("stopped before training; all signs: ties 0.5, saturation 0.75, ")
    assert failed.startswith("guard: the reward looks wrong: ")
    assert (run.store.metrics(1)["guard/ties"], run.store.metrics(1)["guard/saturation"]) == (0.5, 0.75)
    assert not steps.frame.path("guard").exists()


def cut_off_round(run):
    """128 prompts × 8, of which 58 % hit the limit of 80 tokens, and lose to those that ended."""
    rng = np.random.default_rng(3)
    prompts = [
        Prompt(prompt_id=f"p{i}", messages=[{"role": "user", "content": str(i)}], prompt_ids=[1], split="train")
        for i in range(128)
    ]
    rows, rewards = [], []
    for prompt in prompts:
        for k in range(8):
            ends = rng.random() >= 0.58
            ids = rng.integers(3, 900, int(rng.integers(5, 40)) if ends else 80).tolist()
            rows.append(
                Candidate(
                    prompt_id=prompt.prompt_id, index=k, text="x", token_ids=ids, logp=-1.0, n_tokens=len(ids),
                    finish_reason="stop" if ends else "length", policy=0,
                )
            )  # fmt: skip
            rewards.append(Reward(prompt_id=prompt.prompt_id, index=k, reward=float(rng.random() + ends)))
    steps = run.steps(1)
    write_sampled(steps, prompts, rows)

    def score(out, line):
        tables.write_rows(out / "scored.parquet", rewards, Reward)
        folders.write_json(out / "reward.json", {})
        return {}

    steps.frame.do(SCORE, score)
    return steps


def test_answers_that_are_cut_off_and_rejected_are_told_before_the_round_trains(tmp_path):
    run = Opened(tmp_path, "pairs.cut_off=reject", "guard.length_correlation={}", "guard.saturation={}")
    steps = cut_off_round(run)
    steps.frame.do(GUARD, steps.guard)
    assert not steps.frame.path("train").exists()
    cut, gap, decided = run.warned
    assert "answers that were cut off (share) 0.5" in cut and "(guard.cut_off.warn)" in cut
    assert "raise generate.max_tokens" in cut and "pairs.cut_off: drop" in cut
    assert "(guard.length_gap.warn)" in gap and "(guard.decided_by_length.warn)" in decided
    assert all("reward.shaping.length_control" in text for text in (gap, decided))
    assert run.events(1) == [text.removeprefix("warning: round 1: ") for text in run.warned]
    assert run.store.metrics(1)["guard/cut_off"] == pytest.approx(0.58, abs=0.04)


def test_answers_that_are_cut_off_stop_a_round_where_they_are_to(tmp_path):
    run = Opened(tmp_path, "pairs.cut_off=reject", "guard.cut_off={warn: 0.3, stop: 0.5}")
    steps = cut_off_round(run)
    with pytest.raises(StageFailed, match="the answers look wrong: answers that were cut off") as error:
        steps.frame.do(GUARD, steps.guard)
    assert "nothing was trained on" in error.value.__cause__.hint
    assert run.store.metrics(1)["guard/cut_off"] == pytest.approx(0.58, abs=0.04)
    assert not steps.frame.path("guard").exists()
