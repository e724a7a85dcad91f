"""The stages `score` and `evaluate` of a round whose reward is exchanged, between its shards and its attempts."""

import contextlib
import json

import pytest
from fake_reward import fake, send
from outside import Relay
from reward_world import process_of
from steps_world import LINE, Opened, write_sampled

from selfplay.errors import GuardError, Interrupted
from selfplay.rounds import steps as steps_of_rounds
from selfplay.rounds.stages import SCORE
from selfplay.storage import tables
from selfplay.types import Candidate, Prompt

pytestmark = pytest.mark.service


def scoring(score):
    """What a server answers that gives each text what `score` says of it."""

    def answer(handler, asked):
        scores = [score(i["response"]) for i in asked["items"]]
        send(handler, 200, json.dumps({"scores": scores, "ids": [i["id"] for i in asked["items"]]}).encode())

    return answer


def opened(tmp_path, url, **source):
    """A run that is rewarded by the servers at `url`, which judge at the gate too. Two prompts are a shard."""
    reward = json.dumps({"url": [url], "deadline": 20, **source})
    return Opened(
        tmp_path, f"reward={reward}", "evaluate.judge=null", "evaluate.audit_every=0", "generate.shard_prompts=2",
        "generate.candidates=2",
    )  # fmt: skip


def round_of(run, index=1):
    """Six prompts with two answers each, «word» one to twelve times."""
    steps = run.steps(index)
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
    write_sampled(steps, prompts, candidates)
    return steps


def scored(steps):
    out = steps.run.dir / "out"
    out.mkdir(exist_ok=True)
    steps.score(out, LINE)
    return tables.read_column(out / "scored.parquet", "reward")


def exchanged_in_mid_stage(steps, exchange, back):
    """Shard 1 by the right model, shard 2 by another one, and then an outage. What the round has in the end."""

    def interrupt():
        raise Interrupted("an outage")

    shards = iter([lambda: None, exchange, interrupt])
    steps.run.breathe = lambda where: next(shards)()
    with pytest.raises(Interrupted):
        scored(steps)
    assert len(list(steps.frame.dir.glob("score-*.shards/*.parquet"))) == 2
    steps.run.breathe = lambda where: None
    with pytest.raises(GuardError, match="not the one this run began with"):
        scored(steps)
    assert not list(steps.frame.dir.glob("score-*.shards"))
    back()
    return scored(steps)


@pytest.mark.parametrize("weights", ["", "a judge's settings"])
def test_what_an_exchanged_model_scored_before_an_outage_is_not_used(tmp_path, weights):
    """Neither by shard nor by cache: a judge is known by its settings, whatever model is behind its name."""
    sign = [1.0]
    with fake(default=scoring(lambda text: sign[0] * len(text.split()))) as server:
        server.weights = weights
        steps = round_of(opened(tmp_path, server.url))
        rewards = exchanged_in_mid_stage(steps, lambda: sign.__setitem__(0, -1.0), lambda: sign.__setitem__(0, 1.0))
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
        expected = scored(round_of(opened(tmp_path / "calm", relay.url, dialect="openrlhf")))
        steps = round_of(opened(tmp_path / "run", relay.url, dialect="openrlhf"))
        rewards = exchanged_in_mid_stage(
            steps, lambda: setattr(relay, "target", wrong), lambda: setattr(relay, "target", right)
        )
    assert rewards == expected and len(set(expected)) > 1


def test_where_the_reward_judges_it_is_looked_at_after_judging_too(tmp_path, monkeypatch):
    factor = [1.0]

    def judge(out, line, **given):
        factor[0] = 9.0
        return {}

    monkeypatch.setattr(steps_of_rounds, "evaluate", judge)
    with fake(default=scoring(lambda text: factor[0] * len(text))) as server:
        steps = round_of(opened(tmp_path, server.url))
        scored(steps)
        assert steps.run.reward._cache.count() == 12
        with pytest.raises(GuardError, match="not the one this run began with"):
            steps.evaluate(tmp_path, LINE)
        assert steps.run.reward._cache.count() == 0


def test_a_reward_that_was_replaced_before_judging_judges_nothing(tmp_path, monkeypatch):
    factor, judged = [1.0], []
    monkeypatch.setattr(steps_of_rounds, "evaluate", lambda out, line, **given: judged.append(given))
    with fake(default=scoring(lambda text: factor[0] * len(text))) as server:
        steps = round_of(opened(tmp_path, server.url))
        scored(steps)
        factor[0] = 9.0
        with pytest.raises(GuardError, match="not the one this run began with"):
            steps.evaluate(tmp_path, LINE)
        assert steps.run.reward._cache.count() == 0
    assert judged == []


def test_rounds_are_scored_and_what_the_probes_say_of_each_is_in_the_ledger(tmp_path):
    """When the file of probes is deleted, the next round takes the reward as it is, and uses no score of before.

    The rounds have the same texts, so that the cache knows all their scores.
    """
    factor = [1.0]
    with fake(default=scoring(lambda text: factor[0] * len(text.split()))) as server:
        run = opened(tmp_path, server.url)
        for index in (1, 2):
            steps = round_of(run, index)
            steps.frame.do(SCORE, steps.score, total=12)
            found = run.store.metrics(index)
            assert (found["score/probe_change"], found["score/probe_missing"]) == (0.0, 0.0)
            assert (found["score/reward_mean"], found["score/missing"]) == (6.5, 0.0)
        factor[0] = -1.0
        (tmp_path / "reward" / "probes.json").unlink()
        steps = round_of(run, 3)
        steps.frame.do(SCORE, steps.score, total=12)
    assert tables.read_column(steps.frame.path("score/scored.parquet"), "reward") == [-float(n) for n in range(1, 13)]
    assert [run.events(index) for index in (1, 2)] == [[], []]
    assert run.events(3) == ["the reward is taken as it is: probes, scale and cache begin anew"]
