"""What the service decides, on a ledger of its own and rounds that only pretend: no engine, no children but one."""

import contextlib
import http.server
import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from mini import TINY
from rich.console import Console

from selfplay import children, daemon, orders
from selfplay.daemon import Daemon
from selfplay.display import Display
from selfplay.errors import InputError, Interrupted
from selfplay.run import Run
from selfplay.store import Store

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


class Bare(Run):
    """A run of which nothing is open but its ledger."""

    current = SimpleNamespace(version=0)


class World:
    """A daemon over a bare ledger, a clock that is set by hand, and `turn` for one turn of its loop."""

    def __init__(self, run_dir, monkeypatch, *more):
        self.now = NOON
        run_dir.mkdir()
        display = Display(Console(file=(run_dir / "said").open("w")))
        self.daemon = Daemon(TINY, list(more), run_dir, display, clock=lambda: self.now)
        self.store = Store(run_dir)
        self.ran = []
        self.work = lambda: None
        self.daemon.run = Bare(self.daemon.config, run_dir, display)
        self.daemon.run.store = self.store
        monkeypatch.setattr(daemon, "POLL_SECONDS", 0)
        monkeypatch.setattr(daemon, "run_round", self._round)
        monkeypatch.setattr(daemon, "cancel_round", lambda run: self._close("cancelled"))
        monkeypatch.setattr(display, "round_table", lambda report: None)

    def _round(self, run):
        if self.store.unfinished() is None:
            self.open()
        self.ran.append(len(self.store.rounds()))
        self.work()
        return self._close("promoted")

    def open(self):
        self.store.open_round(len(self.store.rounds()) + 1, 0, (0, 0), "f", {})

    def _close(self, state):
        self.store.close_round(len(self.store.rounds()), state, 0, [])
        return SimpleNamespace(outcome=state, reasons=[])

    def turn(self):
        self.daemon._turn()
        return self.daemon.progress.get("state")

    def order(self, kind, **arguments):
        number = orders.submit(self.store, kind, arguments, "test")
        self.daemon._between_rounds()
        return next((row["state"], row["result"]) for row in self.store.orders() if row["id"] == number)


@pytest.fixture
def world(tmp_path, monkeypatch):
    made = []

    def make(*more):
        made.append(World(tmp_path / "run", monkeypatch, *more))
        return made[-1]

    yield make
    for each in made:
        each.store.close()


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
    service._close("cancelled")  # killed between this and the next word
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
    service.daemon._failed(RuntimeError("x"), 4000)
    assert datetime.fromisoformat(service.store.state("retry_at")) == NOON + timedelta(hours=1)
    assert service.turn() == "retrying"
    service.now = NOON - timedelta(days=300)
    service.turn()
    assert service.ran == [1]


@pytest.mark.parametrize("mode", ["{mode: interval, every_minutes: 30}", "{mode: cron, cron: 0 * * * *}"])
def test_a_clock_that_is_set_back_does_not_stop_the_schedule(world, mode):
    service = world(f"schedule={mode}")
    service.open()  # starts by the real clock, which is years ahead of the daemon's, or behind
    service._close("promoted")
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
    child = children.Child("sleeper", argv, run_dir=tmp_path, log=tmp_path / "log")
    child.start()
    before = signal.signal(signal.SIGUSR2, lambda *_: children.cut())  # in the thread that waits
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        began = time.monotonic()
        with pytest.raises(children.ChildDied):
            child.result(1)
        assert time.monotonic() - began < 30
        with pytest.raises(Interrupted):
            children.Child("next", argv, run_dir=tmp_path, log=tmp_path / "log").start()
    finally:
        signal.signal(signal.SIGUSR2, before)
        children.uncut()
    assert children.marked(tmp_path) == []


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
    assert [e["text"] for e in service.store.events()] == ["the service stops"]
    while not cuts and time.monotonic() - began < 10:
        time.sleep(0.01)
    assert cuts[0] - began >= 0.3
    service.daemon.stop()
    assert len(cuts) == 2
    service.daemon._cut.cancel()


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_signals_stop_the_service_and_have_it_read_its_configuration_anew(world, signals, monkeypatch):
    service = world()
    stops = []
    monkeypatch.setattr(service.daemon, "stop", lambda: stops.append(1))
    daemon.handle_signals(service.daemon)
    os.kill(os.getpid(), signal.SIGHUP)
    until(lambda: service.store.orders("pending"))
    (order,) = service.store.orders("pending")
    assert (order["kind"], order["origin"]) == ("reload", "signal")
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    until(lambda: len(stops) == 2)


@contextlib.contextmanager
def webhook(*statuses):
    """A server that takes alerts, with these statuses one after another and then 200; yields its URL and what it got."""
    got, left = [], list(statuses)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(left.pop(0) if left else 200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/secret", got
    finally:
        server.shutdown()
        server.server_close()


def test_an_alert_is_posted_until_it_is_taken(world, monkeypatch, caplog):
    monkeypatch.setattr(daemon.post_alert.retry, "sleep", lambda seconds: None)
    service = world()
    with webhook(500, 503) as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        service.daemon.pause("3 rounds in a row were rejected")
        until(lambda: len(got) == 3)
        assert {path for path, _ in got} == {"/secret"}
        body = got[-1][1]
        assert (body["run"], body["kind"], body["text"]) == ("tiny", "alert", "paused: 3 rounds in a row were rejected")
        assert body["time"] == NOON.isoformat()
        service.daemon.pause("ordered", alert=False)
    with webhook(*[500] * 9) as (url, got):
        daemon.post_alert(url, {"kind": "alert"})  # five tries, then it is given up
        assert len(got) == 5
    assert "did not take an alert" in caplog.text and "secret" not in caplog.text
    assert [e["kind"] for e in service.store.events()] == ["alert"]
