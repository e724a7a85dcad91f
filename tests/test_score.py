"""The stage `score` against a real reward server, killed, absent and refused."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from mini import commands, nothing_left

from selfplay import score
from selfplay.config import RewardConfig
from selfplay.errors import InputError, RewardError
from selfplay.types import Candidate, Prompt

MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def service(mini_world, tmp_path):
    """A factory of services, each ended with the test."""
    made = []

    def make(**settings):
        events = []
        config = RewardConfig.model_validate({"model": str(mini_world / "reward"), "dtype": "float32"} | settings)
        made.append(score.RewardService(config, tmp_path, on_event=lambda kind, text: events.append((kind, text))))
        return made[-1], events

    yield make
    for each in made:
        each.stop()
    assert nothing_left(tmp_path)


def kill_server(run_dir: Path) -> None:
    os.kill(next(pid for pid, words in commands(run_dir) if words[1:3] == ["-m", "reward.server"]), signal.SIGKILL)


def test_a_server_killed_while_it_scores_costs_a_pause(service, tmp_path):
    ours, events = service(batch=8)
    items = [(MESSAGES, f"The answer is {i}.") for i in range(400)]
    calm = ours.score(items)
    assert all(isinstance(v, float) for v in calm)
    identity = ours.identity
    killer = threading.Thread(target=lambda: (time.sleep(0.05), kill_server(tmp_path)))
    killer.start()
    stormy = ours.score(items)
    killer.join()
    assert stormy == pytest.approx(calm, abs=1e-5)
    ours.score(items[:1])  # notices a server that died after its last answer too
    assert ours.identity == identity
    assert ("warning", "the reward server died; starting it again") in events


def test_a_url_where_nobody_answers(service):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        ours, _ = service(model=None, url=[url], deadline=1.0)
        with pytest.raises(RewardError, match="the reward is unavailable") as error:
            ours.score([(MESSAGES, "x")])
    assert url in error.value.hint


def test_a_model_that_is_no_reward_model(service, mini_world):
    ours, _ = service(model=str(mini_world / "train.jsonl"))
    with pytest.raises(InputError, match="did not start") as error:
        ours.score([(MESSAGES, "x")])
    assert "reward.log" in error.value.hint


class Counting:
    """A reward at the process boundary: counts what it is asked, and has no score for some texts."""

    log = Path("reward.log")

    def __init__(self, missing=()):
        self.asked, self.missing = 0, missing

    def score(self, items, on_progress=None):
        self.asked += len(items)
        return [None if text in self.missing else float(len(text)) for _, text in items]


def rows(n):
    return [
        Candidate(
            prompt_id="p", index=i, text=f"answer {i}", token_ids=[i, 2], logp=-1.0, n_tokens=2, finish_reason="stop",
            policy=0,
        )
        for i in range(n)
    ]  # fmt: skip


def stage(service, tmp_path, n=10):
    prompt = Prompt(prompt_id="p", messages=MESSAGES, prompt_ids=[1], split="train")
    return score.score(
        service,
        {"p": prompt},
        rows(n),
        shards=tmp_path / "shards",
        shard_items=4,
        max_missing=0.2,
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
    few = stage(Counting({"answer 3"}), tmp_path / "few")
    assert [r.reward is None for r in few] == [i == 3 for i in range(10)]
    assert score.metrics(few)["missing"] == 1
    with pytest.raises(RewardError, match="3 of 10 answers have no reward"):
        stage(Counting({"answer 1", "answer 2", "answer 3"}), tmp_path / "many")
