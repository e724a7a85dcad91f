"""What the service decides, on a ledger of its own and rounds that only pretend: no engine, no children but one."""

import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from daemon_world import NOON, until, waiting
from mini import TINY

from selfplay.errors import InputError, Interrupted
from selfplay.processes import children
from selfplay.processes.child import Child, ChildDied
from selfplay.processes.reaping import marked
from selfplay.service import orders
from selfplay.service.stop import handle_signals


def test_an_order_for_a_round_holds_until_that_round_is_open(world):
    service = world("schedule={mode: cron, cron: 0 3 * * *}")
    assert service.turn() == "waiting"
    assert service.order("run")[0] == "done"
    service.open()  # killed right here: the round is in the ledger, so nothing is asked for any more
    service.turn()
    assert service.turn() == "waiting"
    assert service.ran == [1]


def test_a_cancel_means_the_round_that_was_open(world):
    service = world()
    service.open()
    service.store.set_state("cancel", 1)
    service.close("cancelled")  # killed between this and the next word
    service.work = lambda: service.daemon._breathe("stage")
    service.turn()
    assert [row["state"] for row in service.store.rounds()] == ["cancelled", "promoted"]


def test_a_cancel_between_two_tries_is_obeyed_at_once(world):
    service = world()

    def fail():
        raise OSError("the network is down")

    service.work = fail
    service.turn()
    assert service.turn() == "retrying"
    assert service.order("cancel") == ("done", "the round is given up")
    assert service.store.unfinished() is None


def test_what_nobody_thought_of_is_tried_again_and_then_pauses(world):
    service = world("service.retries=1", "service.retry_seconds=0")

    def fail():
        raise KeyError("nobody thought of this")

    service.work = fail
    assert service.turn() == "running"
    service.turn()
    assert service.turn() == "paused"
    why = service.store.state("pause")["why"]
    assert "failed 2 times" in why and "KeyError" in why
    assert "nobody thought" in (service.daemon.run_dir / "logs" / "service.log").read_text()


def test_an_order_that_breaks_is_refused_once(world):
    service = world()
    service.daemon.run.add_prompts = lambda rows, origin: {}["x"]
    state, result = service.order("add_prompts", rows=[{"prompt": "x"}])
    assert state == "refused" and "KeyError" in result


def test_a_pause_after_the_round_lets_an_open_one_end(world):
    service = world()
    service.open()
    orders.submit(service.store, "pause", {"after": "round"}, "test")  # while the service was down
    service.turn()
    assert service.turn() == "paused" and service.ran == [1]
    assert service.order("pause", after="round") == ("done", "is paused already")


def test_retries_wait_an_hour_at_most_and_outlive_a_clock_that_is_set_back(world):
    service = world("service.retries=5000", "service.retry_seconds=30")
    service.open()
    service.daemon._failures.count = 3999
    service.daemon._failed(RuntimeError("x"))
    assert "trying again in 3600 s (4000 of 5000)" in service.events("warning")[-1]
    assert service.turn() == "retrying"
    assert service.daemon.progress["why"] == f"next try at {(NOON + timedelta(hours=1)).isoformat()}"
    service.now = NOON - timedelta(days=300)
    service.turn()
    assert service.ran == [1]


@pytest.mark.parametrize("mode", ["{mode: interval, every_minutes: 30}", "{mode: cron, cron: 0 * * * *}"])
def test_a_clock_that_is_set_back_does_not_stop_the_schedule(world, mode):
    service = world(f"schedule={mode}")
    service.open()  # starts by the real clock, which is years ahead of the daemon's, or behind
    service.close("promoted")
    service.now = datetime.now(UTC) - timedelta(days=3)
    for _ in range(15):
        service.now += timedelta(minutes=5)
        service.turn()
    assert len(service.ran) in (1, 2)


def test_a_configuration_that_would_end_the_service_is_refused(world, tmp_path):
    service = world()
    file = tmp_path / "mine.yaml"
    text = TINY.read_text()
    service.daemon._path = file
    for bad, why in (
        ("schedule: {mode: cron, cron: 99 * * * *}", "schedule.cron"),
        ("service: {port: 1}", "service.port cannot change while the service runs"),
        ("cluster: {address: auto}", "cluster cannot change while the service runs"),
        ("train.beta: 1", "unknown key"),
    ):
        file.write_text(f"{text}\n{bad}\n")
        state, result = service.order("reload")
        assert state == "refused" and why in result
    before = service.daemon.config
    file.write_text(text.replace(".cache/tiny/current/reward", str(tmp_path / "nowhere")) + "\n")
    assert "is no checkpoint folder" in service.order("reload")[1]
    assert service.daemon.config is before


def test_a_cut_ends_what_is_waited_for_and_starts_nothing_new(tmp_path):
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = Child("sleeper", argv, run_dir=tmp_path, log=tmp_path / "log")
    child.start()
    before = signal.signal(signal.SIGUSR2, lambda *_: children.cut())  # in the thread that waits
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        began = time.monotonic()
        with pytest.raises(ChildDied):
            child.result(1)
        assert time.monotonic() - began < 30
        with pytest.raises(Interrupted):
            Child("next", argv, run_dir=tmp_path, log=tmp_path / "log").start()
    finally:
        signal.signal(signal.SIGUSR2, before)
        children.uncut()
    assert marked(tmp_path) == []


def test_a_pin_of_weights_that_went_meanwhile_is_refused(world):
    service = world()
    service.store.record_policy(1, "promoted", round=1)

    def gone(version):
        raise InputError("the weights are gone")

    service.daemon.run.policy = gone
    assert service.order("pin", version=1) == ("refused", "the weights are gone")


def test_a_stop_gives_the_shard_its_time_and_then_cuts(world, monkeypatch):
    """The shard that runs is not interrupted, the next one does not begin; after drain_seconds, or asked again, all is cut."""
    cuts = []
    monkeypatch.setattr(children, "cut", lambda: cuts.append(time.monotonic()))
    service = world("service.drain_seconds=0.3")
    shards = []

    def sample():
        for shard in range(3):
            service.daemon._breathe("shard")
            shards.append(shard)
            service.daemon.stop()

    service.work = sample
    began = time.monotonic()
    service.turn()
    assert shards == [0] and not cuts
    assert service.events("interrupted") == ["the service stops"]
    while not cuts and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert cuts[0] - began >= 0.3
    service.daemon.stop()
    assert len(cuts) == 2
    service.daemon._stop.done()


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_stop_the_service_and_have_it_read_its_configuration_anew(world, signals, monkeypatch):
    service = world()
    stops = []
    monkeypatch.setattr(service.daemon, "stop", lambda: stops.append(threading.current_thread()))
    handle_signals(service.daemon.stop, service.daemon.reload)
    os.kill(os.getpid(), signal.SIGHUP)
    until(lambda: service.daemon._reloading)
    service.daemon._write_down()
    (order,) = waiting(service.store)
    assert (order["kind"], order["origin"]) == ("reload", "signal")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    until(lambda: len(stops) == 2)
    assert threading.main_thread() not in stops  # it may hold the locks that a stop takes


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(("missed", "then"), [("skip", "waiting"), ("once", "running")])
def test_what_fell_due_in_a_pause_or_before_the_first_round_is_missed_too(world, missed, then, paused):
    service = world(f"schedule={{mode: cron, cron: 0 3 * * *, missed: {missed}}}")
    with service.store._engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO runs VALUES ('tiny', '2026-03-10T11:00:00+00:00', '{}')")
    assert service.turn() == "waiting"
    if paused:
        service.order("pause", after="stage")
    service.now = NOON + timedelta(hours=16)  # past three in the night
    if paused:
        assert service.turn() == "paused"
        service.order("resume")
    else:
        service.made()  # killed before, and started again now
        service.opened()
    assert service.turn() == then


@pytest.mark.parametrize(("end", "says"), [("device_hours: 2", "2.0 device-hours"), ("tokens: 60", "60 tokens")])
def test_budgets_count_what_the_stages_took(world, monkeypatch, end, says):
    """Half an hour in each of two stages, on two devices; the round itself was open for however long it waited."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    service = world(f"schedule.end={{{end}}}")
    service.open()
    for stage, tokens in (("generate", 40), ("evaluate", 19)):
        service.store.record_stage(1, stage, 1799.0, {"tokens": tokens})
    service.close("promoted")
    assert service.turn() == "running"
    service.store.record_stage(2, "evolve", 2.0, {"tokens": 1})
    assert service.turn() == "ended" and says in service.daemon.progress["why"]
