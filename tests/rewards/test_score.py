"""The stage `score`: finished shards, missing scores, models that change, shaped rewards."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from selfplay.config import ShapingConfig
from selfplay.errors import GuardError, RewardError
from selfplay.methods import shaping
from selfplay.rewards import score
from selfplay.rewards.scorer import Answer
from selfplay.types import Candidate, Prompt

MESSAGES = [{"role": "user", "content": "Name a colour."}]


class Counting:
    """A reward at the process boundary: counts what it is asked, and has no score for some texts."""

    logs, role, members = [Path("reward.log")], "reward", ()

    def __init__(self, missing=(), swapped_at=10**9):
        self.asked, self.missing, self.swapped_at = 0, missing, swapped_at

    def ask(self, items, on_progress=None):
        self.asked += len(items)
        values = [math.nan if text in self.missing else float(len(text)) for _, text in items]
        why = Counter({"no verdict": sum(map(math.isnan, values))})
        identities = ("new" if self.asked > self.swapped_at else "old",)
        return Answer(identities=identities, scores=np.array([values]), reasons=why)


def rows(n):
    return [
        Candidate(
            prompt_id="p", index=i, text=f"answer {i}", token_ids=[i, 2], logp=-1.0, n_tokens=2, finish_reason="stop",
            policy=0,
        )
        for i in range(n)
    ]  # fmt: skip


def stage(scorer, tmp_path, n=10, **shaped):
    return stage_with_reasons(scorer, tmp_path, n, **shaped)[0]


def stage_with_reasons(scorer, tmp_path, n=10, **shaped):
    prompt = Prompt(prompt_id="p", messages=MESSAGES, prompt_ids=[1], split="train")
    return score.score(
        scorer,
        {"p": prompt},
        rows(n),
        identities=("old",),
        shards=tmp_path / "shards",
        shard_items=4,
        max_missing=0.2,
        settings=ShapingConfig(**shaped),
        on_progress=lambda n: None,
    )


def test_finished_shards_are_not_asked_again(tmp_path):
    first = stage(Counting(), tmp_path)
    assert [r.reward for r in first] == [8.0] * 10
    (tmp_path / "shards" / "00000004.parquet").unlink()
    again = Counting()
    assert stage(again, tmp_path) == first
    assert again.asked == 4


def test_items_without_a_score_are_set_aside_and_too_many_are_an_error(tmp_path):
    few, reasons = stage_with_reasons(Counting({"answer 3"}), tmp_path / "few")
    assert [r.reward is None for r in few] == [i == 3 for i in range(10)]
    metrics = score.metrics(few, reasons)
    assert (metrics["missing"], metrics["unparsable"]) == (1, 1)
    with pytest.raises(RewardError, match=r"3 of 10 answers have no reward .*max_missing\): 3 × no verdict"):
        stage(Counting({"answer 1", "answer 2", "answer 3"}), tmp_path / "many")
    mended = Counting()
    assert all(r.reward == 8.0 for r in stage(mended, tmp_path / "many"))
    assert mended.asked == 4  # the shard that lacked some


def test_reasons_that_differ_behind_a_colon_are_one():
    reasons = Counter(
        {"no verdict: 'a'": 1, "no verdict: 'b'": 2, "the rule x: no reference": 7, "too long": 2, "HTTP 413": 1}
    )
    assert score.said(reasons) == "7 × the rule x: no reference, 3 × no verdict, 2 × too long"
    assert score.metrics([], reasons)["unparsable"] == 3


def test_a_model_that_changes_between_shards_is_noticed_and_its_shard_not_kept(tmp_path):
    with pytest.raises(GuardError, match="changed during the stage"):
        stage(Counting(swapped_at=4), tmp_path)
    again = Counting()
    assert [r.reward for r in stage(again, tmp_path)] == [8.0] * 10
    assert again.asked == 6


def test_each_part_of_a_shaped_reward_is_recorded_and_their_sum_is_the_reward(tmp_path):
    """Lengths are 2 tokens; token ids (i, 2): no bigram twice. 8 characters give 8, less .25 for a token beyond one."""
    plain = stage(Counting({"answer 3"}), tmp_path / "plain")
    assert all(r.reward_parts == {} for r in plain)
    shaped = stage(
        Counting({"answer 3"}), tmp_path / "shaped", length_penalty=0.25, length_free=1, repetition_penalty=1
    )
    assert [r.reward for r in shaped] == [None if i == 3 else 7.75 for i in range(10)]
    assert shaped[0].reward_parts == {"external": 8.0, "length_penalty": -0.25, "repetition_penalty": 0.0}
    assert score.metrics(shaped, Counter())["part_length_penalty"] == -0.25
    controlled = score.shape(
        [dataclasses.replace(r, n_tokens=i, reward=None if r.reward is None else 3.0 * i) for i, r in enumerate(plain)],
        ShapingConfig(length_control=1.0, cut_off_penalty=2.0),
    )
    rewarded = [r for r in controlled if r.reward is not None]
    assert shaping.length_slope([r.reward for r in rewarded], [r.n_tokens for r in rewarded], "p" * 9) == pytest.approx(
        0
    )
    assert np.mean([r.reward for r in rewarded]) == pytest.approx(3 * (45 - 3) / 9)
