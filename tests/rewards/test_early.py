"""Scores while others are sampled, with real files and a server that is asked."""

import threading
import time

import pytest
from fake_reward import send
from outside import until
from scoring_world import Stage, length, reward, rows

from selfplay.errors import Interrupted, RewardError
from selfplay.rewards.early import EarlyScoring
from selfplay.storage import tables
from selfplay.types import Candidate


def shards_of(stage):
    """The files that the stage `generate` makes: four answers of one prompt in each."""
    files = []
    for start in range(0, len(stage.candidates), stage.shard_items):
        files.append((start // 4, stage.folder / f"shard-{start}.parquet"))
        tables.write_rows(files[-1][1], stage.candidates[start : start + stage.shard_items], Candidate)
    return files


def early(stage, begins=lambda first: True):
    return EarlyScoring(
        stage.scorer, prompts=stage.folder / "prompts.parquet", shards=stage._shards, begins=begins
    )  # fmt: skip


@pytest.fixture
def ended():
    """Threads that a test began have ended with it."""
    begun = []
    yield begun.append
    for scoring in begun:
        scoring.stop()
        assert not scoring.alive


def test_what_is_scored_meanwhile_is_not_asked_for_again_and_nothing_else_is_different(tmp_path, ended):
    """Shards come in any order. The first prompts' is scored before any other; one is left to the stage."""

    def score(item):
        return None if item["messages"][0]["content"] == "q" and item["response"] == "answer 3" else length(item)

    with reward(score) as server:
        plain = Stage(tmp_path / "plain", server, rows(16, "pqrs"))
        expected = plain.score()
        stage = Stage(tmp_path / "early", server, rows(16, "pqrs"))
        server.items, first = 0, []
        scoring = early(stage, lambda shard: not first.append(tables.read_column(shard, "prompt_id")))
        ended(scoring)
        files = shards_of(stage)
        scoring.add(*files[2])
        time.sleep(0.05)
        assert server.items == 0 and first == []
        scoring.add(*files[0])
        until(lambda: scoring.scored == 8)
        scoring.add(*files[1])
        until(lambda: scoring.scored == 12)
        scoring.finish(lambda where: None)
        assert server.items == 12 and first == [["p"] * 4] and scoring.trouble is None and 0 < scoring.seconds < 10
        assert stage.score() == expected and server.items == 16
    for name in ("scored.parquet", "reward.json"):
        assert (stage.folder / name).read_bytes() == (plain.folder / name).read_bytes()


def test_an_ensemble_is_scored_meanwhile_too(tmp_path, ended):
    with reward() as one, reward(lambda item: -length(item), "two") as two:
        plain = Stage(tmp_path / "plain", {"a": one, "b": two}, rows(8, "pq"))
        plain.score()
        stage = Stage(tmp_path / "early", {"a": one, "b": two}, rows(8, "pq"))
        one.items = two.items = 0
        scoring = early(stage)
        ended(scoring)
        for shard in shards_of(stage):
            scoring.add(*shard)
        until(lambda: scoring.scored == 8)
        scoring.finish(lambda where: None)
        stage.score()
        assert one.items == two.items == 8
    assert (stage.folder / "scored.parquet").read_bytes() == (plain.folder / "scored.parquet").read_bytes()


def test_where_the_reward_is_not_the_one_that_is_known_nothing_is_asked(tmp_path, ended):
    with reward() as server:
        stage = Stage(tmp_path, server, rows(8, "pq"))
        scoring = early(stage, lambda first: False)
        ended(scoring)
        for shard in shards_of(stage):
            scoring.add(*shard)
        until(lambda: not scoring.alive)
        assert server.items == 0 and not stage.shards and scoring.trouble is None


@pytest.mark.slow
def test_an_outage_ends_it_and_the_stage_meets_it_again(tmp_path, ended):
    with reward() as server:
        stage = Stage(tmp_path, server, rows(8, "pq"), deadline=1)
        files = shards_of(stage)
        scoring = early(stage)
        ended(scoring)
        scoring.add(*files[0])
        until(lambda: scoring.scored == 4)
        answer, server.default = server.default, lambda handler, asked: send(handler, 503, b"")
        scoring.add(*files[1])
        until(lambda: not scoring.alive)
        assert isinstance(scoring.trouble, RewardError) and scoring.scored == 4
        with pytest.raises(RewardError, match="unavailable"):
            stage.score()
        server.default, server.items = answer, 0
        assert stage.rewards() == [8.0] * 8 and server.items == 4


def test_it_stops_at_once_while_a_server_hangs_and_what_is_whole_stays(tmp_path, ended):
    freed = threading.Event()
    with reward() as server:
        stage = Stage(tmp_path, server, rows(8, "pq"))
        files = shards_of(stage)
        scoring = early(stage)
        ended(scoring)
        scoring.add(*files[0])
        until(lambda: scoring.scored == 4)
        answer, asked = server.default, threading.Event()

        def hang(handler, body):
            asked.set()
            freed.wait(20)
            answer(handler, body)

        server.default = hang
        scoring.add(*files[1])
        assert asked.wait(10)
        began = time.monotonic()
        with pytest.raises(Interrupted):  # a wait for the shard in flight ends where the round is to end
            scoring.finish(lambda where: (_ for _ in ()).throw(Interrupted("the service stops")))
        scoring.stop()
        assert not scoring.alive and time.monotonic() - began < 1
        assert isinstance(scoring.trouble, Interrupted)
        freed.set()
        server.default = answer
        until(lambda: server.items == 8)  # the answer that nobody waited for
        assert stage.rewards() == [8.0] * 8 and server.items == 12
