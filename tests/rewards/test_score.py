"""The stage `score` against a real reward server, killed, absent and refused."""

import dataclasses
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mini import commands, nothing_left

from selfplay.config import RewardSource, ShapingConfig
from selfplay.errors import GuardError, InputError, RewardError
from selfplay.methods import shaping
from selfplay.processes.child import Child
from selfplay.rewards import score
from selfplay.rewards.scorer import Answer
from selfplay.types import Candidate, Prompt

MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def service(mini_world, tmp_path):
    """A factory of services, each ended with the test."""
    made = []

    def make(**settings):
        events = []
        config = RewardSource.model_validate({"model": str(mini_world / "reward"), "dtype": "float32"} | settings)
        made.append(score.RewardService(config, tmp_path, on_event=lambda kind, text: events.append((kind, text))))
        return made[-1], events

    yield make
    for each in made:
        each.stop()
    assert nothing_left(tmp_path)


def server(run_dir: Path) -> int:
    return next(pid for pid, words in commands(run_dir) if words[1:3] == ["-m", "reward.server"])


def kill_server(run_dir: Path) -> None:
    os.kill(server(run_dir), signal.SIGKILL)


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
    assert ("reward_restart", "the reward server died; starting it again") in events


@pytest.mark.timeout(120)
def test_a_server_killed_before_it_was_ever_asked_is_started_again(service, tmp_path):
    ours, events = service()
    ours.start()
    while not [pid for pid, words in commands(tmp_path) if words[1:3] == ["-m", "reward.server"]]:
        time.sleep(0.01)
    kill_server(tmp_path)
    while ours._child.alive:
        time.sleep(0.01)
    assert ours.score([(MESSAGES, "Blue.")])[0] is not None
    assert events == [("reward_restart", "the reward server died; starting it again")]


RULES = {"model": None, "rules": [{"rule": "length", "max": 9}]}


@pytest.mark.timeout(120)
def test_a_server_that_hangs_is_ended_and_the_next_call_starts_another(service, tmp_path):
    ours, events = service(**RULES, deadline=1.0)
    assert ours.score([(MESSAGES, "Blue.")]) == [1.0]
    os.kill(server(tmp_path), signal.SIGSTOP)
    with pytest.raises(RewardError, match="the reward is unavailable"):
        ours.score([(MESSAGES, "Blue.")])
    ours._config, ours._client = ours._config.model_copy(update={"deadline": 60.0}), None
    assert ours.score([(MESSAGES, "Blue.")]) == [1.0]
    assert events == [("reward_restart", "the reward server died; starting it again")]


@pytest.mark.timeout(120)
def test_an_outage_does_not_wait_for_a_server_that_never_comes_up(service, tmp_path, monkeypatch):
    ours, events = service(**RULES, deadline=3.0)
    ours.score([(MESSAGES, "Blue.")])

    def start():
        if ours._child is None:
            ours._child = Child("reward", ["sleep", "1000"], run_dir=tmp_path, log=ours.log, silence=1000)
            ours._child.start()

    with monkeypatch.context() as patch:
        patch.setattr(ours, "start", start)
        kill_server(tmp_path)
        patch.setattr(ours, "_ready", lambda: ours._client)  # it died a moment after it was seen alive
        with pytest.raises(RewardError, match="the reward is unavailable"):
            ours.score([(MESSAGES, "Blue.")])
    ours._config, ours._client = ours._config.model_copy(update={"deadline": 60.0}), None
    assert ours.score([(MESSAGES, "Blue.")]) == [1.0]
    assert [kind for kind, _ in events] == ["reward_restart"]


@pytest.mark.parametrize(("code", "error"), [(2, InputError), (20, RewardError), (201, RewardError), (1, RewardError)])
def test_only_exit_code_2_means_that_it_cannot_be_served(service, tmp_path, code, error):
    ours, _ = service()
    ours.log.parent.mkdir()
    ours.log.write_text("what it said last\n")
    child = Child("reward", ["sh", "-c", f"exit {code}"], run_dir=tmp_path, log=ours.log)
    child.start()
    ours._child = child
    with pytest.raises(error, match="did not start: what it said last"):
        ours._wait_until_it_serves()


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
