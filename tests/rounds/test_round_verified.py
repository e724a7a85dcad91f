"""A reference goes from the prompt file to the reward server, and to the judge at the gate."""

from types import SimpleNamespace

import pytest
from test_importer import built, jsonl, settings

from selfplay.config import RewardConfig, RewardSource
from selfplay.evaluation.judge import Judge
from selfplay.prompts.pool import Pool
from selfplay.rewards import scoring
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.storage import tables
from selfplay.types import Candidate, Reward

pytestmark = pytest.mark.service

RIGHT = [{"rule": "exact"}]


def answers(prompts, text):
    return [
        Candidate(
            prompt_id=p.prompt_id, index=0, text=text, token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=0
        )
        for p in prompts
    ]  # fmt: skip


def test_references_reach_the_reward_and_the_judge(tmp_path):
    """Every prompt has another right answer, and one answer is given to all: right for one of them alone."""
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": f"What is {i} + 1?", "answer": i + 1} for i in range(60)])
    built(settings(file), tmp_path)
    prompts = Pool(tmp_path / "pool")
    train, held_out = (prompts.read(prompts.ids(split)) for split in ("train", "heldout"))
    prompts.write([p.prompt_id for p in train], tmp_path / "prompts.parquet")
    right = train[3].reference
    tables.write_rows(tmp_path / "candidates.parquet", answers(train, right), Candidate)
    scorer = Scorer(
        "reward", [RewardSource.model_validate({"rules": RIGHT})], None, tmp_path,
        cache=ScoreCache(tmp_path / "scores.sqlite", 1000), gpus=None, on_event=lambda kind, text: None,
    )  # fmt: skip
    try:
        scoring.score(
            tmp_path,
            SimpleNamespace(update=lambda **shown: None),
            prompts=tmp_path / "prompts.parquet",
            candidates=tmp_path / "candidates.parquet",
            scorer=scorer,
            settings=RewardConfig(rules=RIGHT),
            shards=lambda who: tmp_path / "shards",
            shard_items=16,
            probe=lambda: {},
            breathe=lambda where: None,
            record_event=lambda kind, text: None,
        )
        rewards = [row.reward for row in tables.read_rows(tmp_path / "scored.parquet", Reward)]
        assert rewards == [float(p.reference == right) for p in train] and sum(rewards) == 1
        judge = Judge(
            scorer=scorer, identities=scorer.identities, max_missing=0.0, gold=None, gold_name="", described={},
            dependent=None,
        )  # fmt: skip
        ours = [answers([p], p.reference)[0] for p in held_out]
        found, others = judge.both(held_out, ours, answers(held_out, "no number"), lambda where: None)
        assert {row.reward for row in found} == {1.0} and {row.reward for row in others} == {0.0}
    finally:
        scorer.stop()
