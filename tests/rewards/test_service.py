"""A reward service with a real reward server: killed, hanging, absent and refused."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from fake_reward import fake, send
from mini import commands, nothing_left

from selfplay.config import RewardSource
from selfplay.errors import InputError, RewardError
from selfplay.processes.child import Child
from selfplay.rewards.service import RewardService
from selfplay.rewards.texts import Item

pytestmark = pytest.mark.service

MESSAGES = [{"role": "user", "content": "Name a colour."}]
RULES = {"model": None, "rules": [{"rule": "length", "max": 9}]}  # a server of them starts without torch


@pytest.fixture
def service(mini_world, tmp_path):
    """A factory of services, each ended with the test."""
    made = []

    def make(**settings):
        events = []
        config = RewardSource.model_validate({"model": str(mini_world / "reward"), "dtype": "float32"} | settings)
        made.append(RewardService(config, tmp_path, on_event=lambda kind, text: events.append((kind, text))))
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
    items = [Item(MESSAGES, f"The answer is {i}.") for i in range(400)]
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
    ours, events = service(**RULES)
    ours.start()
    while not [pid for pid, words in commands(tmp_path) if words[1:3] == ["-m", "reward.server"]]:
        time.sleep(0.01)
    kill_server(tmp_path)
    while ours._child.alive:
        time.sleep(0.01)
    assert ours.score([Item(MESSAGES, "Blue.")]) == [1.0]
    assert events == [("reward_restart", "the reward server died; starting it again")]


@pytest.mark.timeout(120)
def test_a_server_that_hangs_is_ended_and_the_next_call_starts_another(service, tmp_path):
    ours, events = service(**RULES, deadline=1.0)
    assert ours.score([Item(MESSAGES, "Blue.")]) == [1.0]
    os.kill(server(tmp_path), signal.SIGSTOP)
    with pytest.raises(RewardError, match="the reward is unavailable"):
        ours.score([Item(MESSAGES, "Blue.")])
    ours._config, ours._client = ours._config.model_copy(update={"deadline": 60.0}), None
    assert ours.score([Item(MESSAGES, "Blue.")]) == [1.0]
    assert events == [("reward_restart", "the reward server died; starting it again")]


@pytest.mark.timeout(120)
def test_an_outage_does_not_wait_for_a_server_that_never_comes_up(service, tmp_path, monkeypatch):
    ours, events = service(**RULES, deadline=3.0)
    ours.score([Item(MESSAGES, "Blue.")])

    def start():
        if ours._child is None:
            ours._child = Child("reward", ["sleep", "1000"], run_dir=tmp_path, log=ours.log, silence=1000)
            ours._child.start()

    with monkeypatch.context() as patch:
        patch.setattr(ours, "start", start)
        kill_server(tmp_path)
        patch.setattr(ours, "_ready", lambda: ours._client)  # it died a moment after it was seen alive
        with pytest.raises(RewardError, match="the reward is unavailable"):
            ours.score([Item(MESSAGES, "Blue.")])
    ours._config, ours._client = ours._config.model_copy(update={"deadline": 60.0}), None
    assert ours.score([Item(MESSAGES, "Blue.")]) == [1.0]
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
            ours.score([Item(MESSAGES, "x")])
    assert url in error.value.hint


def test_a_model_that_is_no_reward_model(service, mini_world):
    ours, _ = service(model=str(mini_world / "train.jsonl"))
    with pytest.raises(InputError, match="did not start") as error:
        ours.score([Item(MESSAGES, "x")])
    assert "reward.log" in error.value.hint


@pytest.mark.parametrize(("servers", "concurrency", "most"), [(1, None, 2), (3, None, 6), (3, 1, 1)])
def test_two_requests_are_in_flight_for_each_server(tmp_path, servers, concurrency, most):
    """Every request waits until `most` are there, or for as long as one more might take to come."""
    lock, now, highest = threading.Lock(), [0], [0]
    full = threading.Event()

    def answer(handler, asked):
        with lock:
            now[0] += 1
            highest[0] = max(highest[0], now[0])
            if now[0] >= most:
                full.set()
        full.wait(10)
        time.sleep(0.1)
        with lock:
            now[0] -= 1
        send(handler, 200, b'{"scores": [1.0]}')

    with contextlib.ExitStack() as all_of_them:
        urls = [all_of_them.enter_context(fake(default=answer)).url for _ in range(servers)]
        config = RewardSource(url=urls, batch=1, concurrency=concurrency)
        ours = RewardService(config, tmp_path, on_event=lambda kind, text: None)
        assert ours.score([Item(MESSAGES, str(i)) for i in range(4 * most)]) == [1.0] * 4 * most
        ours.stop()
    assert highest == [most]


@pytest.mark.parametrize(
    ("settings", "gpus", "devices"),
    [
        ({"model": "m"}, None, 1),
        ({"model": "m"}, [4], 1),
        ({"model": "m"}, [4, 5, 6], 3),
        ({"model": "m", "device": "all"}, [4, 5], 2),
        ({"model": "m", "device": "cuda:0,cuda:1"}, None, 2),
        ({"rules": [{"rule": "length", "max": 9}]}, [4, 5], 1),
    ],
)
def test_a_server_of_ours_has_a_copy_of_the_model_on_each_of_its_gpus(tmp_path, settings, gpus, devices):
    ours = RewardService(
        RewardSource.model_validate(settings), tmp_path, gpus=gpus, on_event=lambda kind, text: None
    )  # fmt: skip
    assert ours._devices() == devices
