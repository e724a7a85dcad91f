"""The stages `score`, `guard` and `evaluate` of a round whose reward is exchanged, between its shards and its attempts."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from outside import Relay
from reward_world import process_of
from test_reward_client import fake, send

from selfplay.config import GuardConfig, RewardConfig, RewardSource
from selfplay.errors import GuardError, Interrupted
from selfplay.evaluation import evaluate
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.rounds.round import Round
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Prompt

LINE = SimpleNamespace(update=lambda **shown: None)


def round_of(tmp_path, source, breathe=lambda where: None):
    """Six prompts with two answers each, «word» one to twelve times; two prompts are a shard."""
    tmp_path.mkdir(exist_ok=True)
    store, warned = Store(tmp_path), []
    cache = ScoreCache(tmp_path / "reward" / "scores.sqlite", 1000)
    reward = Scorer("reward", [source], None, tmp_path, cache=cache, gpus=None, on_event=store.event)
    run = SimpleNamespace(
        dir=tmp_path, store=store, display=SimpleNamespace(warn=warned.append), reward=reward, judge=reward, breathe=breathe
    )  # fmt: skip
    run.config = SimpleNamespace(
        generate=SimpleNamespace(shard_prompts=2, candidates=2), reward=RewardConfig(model="any"), guard=GuardConfig()
    )
    r = Round(run, 1, 0)
    prompts = [
        Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in "abcdef"
    ]
    candidates = [
        Candidate(
            prompt_id=p.prompt_id, index=i, text=" ".join(["word"] * (2 * n + i + 1)), token_ids=[5, 2], logp=-1.0, n_tokens=2,
            finish_reason="stop", policy=0,
        )
        for n, p in enumerate(prompts) for i in range(2)
    ]  # fmt: skip
    for stage, rows, kind in (("prompts", prompts, Prompt), ("generate", candidates, Candidate)):
        (r.dir / stage).mkdir(parents=True, exist_ok=True)
        tables.write_rows(r.dir / stage / f"{stage if stage == 'prompts' else 'candidates'}.parquet", rows, kind)
    return r


def scored(r, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    r.score(folder, LINE)
    return [row["reward"] for row in tables.pq.read_table(folder / "scored.parquet").to_pylist()]


def exchanged_in_mid_stage(r, tmp_path, exchange, back):
    """Shard 1 by the right model, shard 2 by another one, and then an outage. What the round has in the end."""
    shards = iter([lambda: None, exchange, lambda: interrupt()])

    def interrupt():
        raise Interrupted("an outage")

    r.run.breathe = lambda where: next(shards)()
    with pytest.raises(Interrupted):
        scored(r, tmp_path)
    r.run.breathe = lambda where: None
    with pytest.raises(GuardError, match="not the one this run began with"):
        scored(r, tmp_path)
    back()
    return scored(r, tmp_path)


@pytest.mark.parametrize("weights", ["", "a judge's settings"])
def test_what_an_exchanged_model_scored_before_an_outage_is_not_used(tmp_path, weights):
    """Neither by shard nor by cache: a judge is known by its settings, whatever model is behind its name."""
    sign = [1.0]

    def answer(handler, asked):
        scores = [sign[0] * len(i["response"].split()) for i in asked["items"]]
        send(handler, 200, json.dumps({"scores": scores, "ids": [i["id"] for i in asked["items"]]}).encode())

    with fake(default=answer) as server:
        server.weights = weights
        r = round_of(tmp_path, RewardSource(url=[server.url]))
        rewards = exchanged_in_mid_stage(
            r, tmp_path, lambda: sign.__setitem__(0, -1.0), lambda: sign.__setitem__(0, 1.0)
        )
    assert rewards == [float(n) for n in range(1, 13)]


def test_a_service_without_a_name_that_is_exchanged_before_an_outage(tmp_path):
    """Two real servers of rules that count words, one of them with another sign, asked as OpenRLHF's."""
    rules = [
        json.dumps([{"rule": "length", "max": 1, "min": 1, "weight": w}, {"rule": "length", "min": 99, "weight": w}])
        for w in (1.0, -1.0)
    ]
    with contextlib.ExitStack() as both:
        right, wrong = (both.enter_context(process_of("--rules", rule))[1]["url"] for rule in rules)
        relay = both.enter_context(Relay(right))
        source = RewardSource(url=[relay.url], dialect="openrlhf")
        expected = scored(round_of(tmp_path / "calm", source), tmp_path / "calm")
        r = round_of(tmp_path / "run", source)
        rewards = exchanged_in_mid_stage(
            r, tmp_path / "run", lambda: setattr(relay, "target", wrong), lambda: setattr(relay, "target", right)
        )
    assert rewards == expected and len(set(expected)) > 1


def test_where_the_reward_judges_it_is_looked_at_after_judging_too(tmp_path, monkeypatch):
    factor = [1.0]

    def answer(handler, asked):
        scores = [factor[0] * len(i["response"]) for i in asked["items"]]
        send(handler, 200, json.dumps({"scores": scores, "ids": [i["id"] for i in asked["items"]]}).encode())

    def judge(r, folder, line):
        factor[0] = 9.0
        return {}

    monkeypatch.setattr(evaluate, "evaluate", judge)
    with fake(default=answer) as server:
        r = round_of(tmp_path, RewardSource(url=[server.url]))
        scored(r, tmp_path)
        with pytest.raises(GuardError, match="not the one this run began with"):
            r.evaluate(tmp_path, LINE)
        assert r.run.reward._cache.count() == 0
