"""The stage `generate` over a generator that only pretends: shards that are kept, and stops between them."""

import pytest

from selfplay.errors import Interrupted
from selfplay.generation import sampling
from selfplay.types import Candidate, Prompt

PROMPTS = [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=[1, i], split="train") for i in range(5)]


class Pretended:
    """Answers each prompt with its seed; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def generate(self, prompts, *, candidates, max_tokens, on_progress):
        self.asked.append([prompt_id for prompt_id, _, _ in prompts])
        on_progress(len(prompts))
        return [
            Candidate(
                prompt_id=prompt_id, index=k, text=f"{seed}", token_ids=[seed + k, 2], logp=-1.0, n_tokens=2,
                finish_reason="stop" if k else "length", policy=3,
            )
            for prompt_id, _, seed in prompts for k in range(candidates)
        ]  # fmt: skip


def stage(generator, folder, before_shard=lambda: None):
    done = []
    rows = sampling.generate(
        generator,
        PROMPTS,
        candidates=2,
        seed=lambda prompt_id: int(prompt_id[1:]) * 100,
        shards=folder,
        shard_prompts=2,
        on_progress=done.append,
        before_shard=before_shard,
    )
    return rows, done


def test_prompts_are_sampled_in_shards_and_in_order(tmp_path):
    generator = Pretended()
    rows, done = stage(generator, tmp_path / "shards")
    assert generator.asked == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [(r.prompt_id, r.index) for r in rows] == [(f"p{i}", k) for i in range(5) for k in range(2)]
    assert rows[7].token_ids == [301, 2] and rows[7].policy == 3
    assert sorted(done) == done and done[-1] == 5


def test_a_stop_between_shards_loses_none_and_no_shard_is_sampled_twice(tmp_path):
    whole, _ = stage(Pretended(), tmp_path / "whole")
    left = [2]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted("the service stops")

    with pytest.raises(Interrupted):
        stage(Pretended(), tmp_path / "shards", stop)
    again = Pretended()
    rows, _ = stage(again, tmp_path / "shards")
    assert again.asked == [["p4"]]
    assert rows == whole


def test_metrics_by_hand():
    """Four answers of the same two tokens to one prompt, the first cut off and without text."""
    rows = [
        Candidate(
            prompt_id="p", index=k, text="a" if k else " ", token_ids=[7, 2], logp=-1.0, n_tokens=2,
            finish_reason="stop" if k else "length", policy=0,
        )
        for k in range(4)
    ]  # fmt: skip
    assert sampling.metrics(rows, seconds=2.0) == {
        "candidates": 4, "tokens": 8, "tokens_per_second": 4.0, "length_mean": 2.0, "cut_off_share": 0.25, "empty_share": 0.25,
        "duplicate_share": 0.75,
    }  # fmt: skip
    assert sampling.metrics([], seconds=0.0)["tokens_per_second"] == 0.0
