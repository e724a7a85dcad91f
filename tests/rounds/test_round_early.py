"""The stage `generate` of a round, while which the reward scores what is whole: exchanged, down and interrupted meanwhile."""

import threading
import time
from types import SimpleNamespace

import pytest
from fake_reward import fake, send
from outside import until
from steps_world import LINE
from test_round_score import opened, scoring

from selfplay.errors import GuardError, Interrupted, RewardError
from selfplay.generation.generator import Sampled
from selfplay.storage import folders, tables
from selfplay.types import Candidate, Prompt

pytestmark = pytest.mark.service


class Pretended:
    """Answers prompt p with «word» so often as its seed says, twice; before each shard it does what `before` says."""

    def __init__(self, before):
        self.before = before

    def sample(self, asks, *, on_progress, before_shard, on_shard):
        (asked,) = asks
        for shard in asked.shards:
            before_shard()
            start, count = shard.start, len(shard.seeds)
            self.before(start // count)
            rows = tables.read_slice(asked.prompts, Prompt, start, count)
            said = [
                Candidate(
                    prompt_id=row.prompt_id, index=k, text=" ".join(["word"] * (2 * start + 2 * i + k + 1)),
                    token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=0,
                )
                for i, row in enumerate(rows) for k in range(asked.candidates)
            ]  # fmt: skip
            tables.write_rows(shard.file, said, Candidate)
            on_shard(shard, Sampled(rows=len(said), tokens=2 * len(said), seconds=1.0))


def sampling(run, before, index=1):
    """A round of six prompts, which are sampled two at a time."""
    steps = run.steps(index)
    run.generator = Pretended(before)
    run.serving = SimpleNamespace(serve=lambda policy: None, engine=lambda: run.generator)
    path = steps.frame.path("prompts/prompts.parquet")
    if not path.exists():
        folders.make(path.parent)
        prompts = [
            Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train")
            for p in "abcdef"
        ]
        tables.write_rows(path, prompts, Prompt)
    return steps


def generate(steps):
    out = steps.frame.path("generate")
    folders.make(out)
    return steps.generate(out, LINE)


def generated(steps):
    try:
        return generate(steps)
    finally:
        steps.run.stop_early()


def scored(steps):
    out = steps.run.dir / "out"
    folders.make(out)
    return steps.score(out, LINE), tables.read_column(out / "scored.parquet", "reward")


def shards(steps):
    return list(steps.frame.dir.glob("score-*.shards/*.parquet"))


class Server:
    """Words are counted. `asked` has the number of items in every request."""

    def __init__(self):
        self.factor, self.asked, self.down = 1.0, [], False

    def __call__(self, handler, body):
        if self.down:
            send(handler, 503, b"")
            return
        self.asked.append(len(body["items"]))
        scoring(lambda text: self.factor * len(text.split()))(handler, body)


@pytest.fixture
def server():
    ours = Server()
    with fake(default=ours) as served:
        ours.url = served.url
        yield ours


def test_rewards_come_while_others_are_sampled_and_are_the_same(server, tmp_path):
    """The probes of the first round are four texts of its first shard: asked before the first score, and twice by `score`."""
    plain = sampling(opened(tmp_path / "plain", server.url), lambda shard: None)
    plain.rewarding.begin_early = lambda before: None
    assert "scored" not in generated(plain)
    assert shards(plain) == []
    expected = scored(plain)
    run = opened(tmp_path / "early", server.url)
    steps = sampling(run, lambda shard: until(lambda: len(shards(steps)) == shard))  # each is scored before the next
    server.asked.clear()
    shown = []
    found = steps.generate(plain.frame.path("generate"), SimpleNamespace(update=lambda **said: shown.append(said)))
    assert found["scored"] >= 8 and found["overlap_seconds"] > 0
    assert {"text": "4 candidates scored"} in shown
    folders.make(steps.frame.path("generate"))
    plain.frame.path("generate/candidates.parquet").rename(steps.frame.path("generate/candidates.parquet"))
    assert scored(steps) == expected and expected[1] == [float(n) for n in range(1, 13)]
    assert server.asked == [4, 4, 4, 4, 4, 4]  # probes, three shards, probes, probes
    probes = "reward/probes.json"
    assert (run.dir / probes).read_text() == (plain.run.dir / probes).read_text()


def test_a_round_that_is_interrupted_goes_on_with_what_was_scored(server, tmp_path):
    run = opened(tmp_path, server.url)

    def before(shard):
        if shard == 2:
            until(lambda: len(shards(steps)) == 2)
            raise Interrupted("the service stops")

    steps = sampling(run, before)
    with pytest.raises(Interrupted):
        generated(steps)
    assert not run.early.alive
    probes = (run.dir / "reward/probes.json").read_text()
    server.asked.clear()
    again = sampling(run, lambda shard: None)
    generate(again)  # as in a round: what it has asked for is waited for by `score`
    assert scored(again)[1] == [float(n) for n in range(1, 13)]
    run.stop_early()
    assert sum(server.asked) == 3 * 4 + 4  # probes, and the third shard
    assert (run.dir / "reward/probes.json").read_text() == probes


def test_what_an_exchanged_reward_scores_meanwhile_is_forgotten(server, tmp_path):
    def before(shard):
        until(lambda: len(shards(steps)) == shard)
        server.factor = -1.0 if shard == 2 else 1.0

    run = opened(tmp_path, server.url, identity="ours")  # vouched for, so that the cache has its scores
    steps = sampling(run, before)
    generated(steps)
    run.early.finish(lambda where: None)
    with pytest.raises(GuardError, match="not the one this run began with"):
        scored(steps)
    assert shards(steps) == [] and run.reward._cache.count() == 0
    server.factor = 1.0
    assert scored(steps)[1] == [float(n) for n in range(1, 13)]


def test_a_reward_that_is_down_fails_the_stage_score_and_no_other(server, tmp_path):
    run = opened(tmp_path, server.url, deadline=0.5)

    def before(shard):
        if shard == 1:
            until(lambda: len(shards(steps)) == 1)
            server.down = True
        if shard == 2:
            until(lambda: not run.early.alive)

    steps = sampling(run, before)
    assert generated(steps)["scored"] == 4
    assert isinstance(run.early.trouble, RewardError)
    with pytest.raises(RewardError, match="unavailable"):
        scored(steps)
    server.down = False
    assert scored(steps)[1] == [float(n) for n in range(1, 13)]
    assert run.events(1) == []


def test_where_the_run_does_not_know_the_reward_the_stage_is_left_to_ask(server, tmp_path):
    run = opened(tmp_path, server.url)
    first = sampling(run, lambda shard: None)
    generated(first)
    scored(first)
    server.factor = -1.0
    second = sampling(run, lambda shard: until(lambda: not run.early.alive) if shard == 1 else None, index=2)
    assert generated(second)["scored"] == 0 and shards(second) == []
    with pytest.raises(GuardError, match="not the one this run began with"):
        scored(second)


def test_a_round_that_ends_leaves_no_thread_behind(server, tmp_path):
    """Nor one that waits for a server that is down: it ends with the wait."""
    before = set(threading.enumerate())  # of other tests in this process
    run = opened(tmp_path, server.url, deadline=2)
    server.down = True
    steps = sampling(run, lambda shard: time.sleep(0.2) if shard == 1 else None)
    generated(steps)
    until(lambda: not run.early.alive)
    names = ("early-scoring", "reward-client")
    until(lambda: not [t for t in set(threading.enumerate()) - before if t.name in names])
