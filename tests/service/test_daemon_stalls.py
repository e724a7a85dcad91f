"""A round that hangs: what it waits for is ended, and what is tried again then is the service's usual business."""

import contextlib
import sys
import threading
import time

import pytest
from daemon_world import until, webhook

from selfplay.processes import children
from selfplay.processes.child import PATIENT, Child, ChildDied
from selfplay.reporting.terminal import Line
from selfplay.service import stalls

pytestmark = pytest.mark.service

CHILD = """
import sys, time
from selfplay.processes.protocol import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    channel.progress(order)
    while order["order"] == "work":
        channel.progress(order)
        time.sleep(0.01)
    time.sleep(300)
"""


@pytest.fixture
def child(tmp_path):
    def start():
        started = Child(
            "engine", [sys.executable, "-c", CHILD], run_dir=tmp_path, log=tmp_path / "engine.log", silence=PATIENT
        )
        started.start()
        started.wait_for("ready")
        return started

    yield start
    children.stop_all()


def served(service):
    """The service in a thread of its own."""
    thread = threading.Thread(target=service.daemon.serve)
    thread.start()
    return thread


def look_much_later(service):
    service.daemon._stalls.moved = children._heard = time.monotonic() - 7200
    service.daemon._stalls.look()


def test_a_child_that_hangs_is_ended_the_stage_tried_again_and_then_the_service_pauses(world, child, monkeypatch):
    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        service = world("service.retries=1", "service.retry_seconds=0", "service.stall_hours=1")
        service.made()
        hangs = threading.Event()
        service.work = lambda: child().order("hang", lambda event: hangs.set())
        thread = served(service)
        for _ in range(2):
            assert hangs.wait(60)
            hangs.clear()
            look_much_later(service)
        until(lambda: got)
        service.daemon.stop()
        thread.join(60)
    assert len(service.events("stalled")) == 2 and "has not got on for 2.0 h" in service.events("stalled")[0]
    (alert,) = service.events("alert")
    assert alert.startswith("paused: a round failed 2 times") and "the engine process was killed by SIGKILL" in alert
    assert service.ran == [1, 1]


def test_what_gets_on_is_left_alone(world, child):
    """However long it takes: a child that says a word, or a stage that does."""
    service = world("service.stall_hours=1")
    service.made()
    worker = child()
    told = threading.Event()

    def ask():
        with contextlib.suppress(ChildDied):
            worker.order("work", lambda event: told.set())

    thread = threading.Thread(target=ask)
    long_ago = time.monotonic() - 7200
    service.daemon._stalls.moved = long_ago
    thread.start()
    assert told.wait(60)
    service.daemon._stalls.look()
    assert worker.alive and not service.daemon._stalls.count
    worker.cut()
    thread.join(60)
    children._heard = long_ago
    service.daemon._on_line(Line(service.daemon.display, 1, "score", None, ""))
    service.daemon._stalls.look()
    assert not service.daemon._stalls.count
    look_much_later(service)
    assert service.daemon._stalls.count == 1


def test_people_are_told_of_what_hangs_outside_the_children(world, monkeypatch):
    """A function of the user's, or a disk."""
    monkeypatch.setattr(stalls, "LOOK_SECONDS", 0.05)
    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        service = world("service.stall_hours=0.0001", "train.silence=0.01", "generate.engine.silence=0.01")
        service.made()
        goes_on = threading.Event()
        service.work = lambda: goes_on.wait(60)
        thread = served(service)
        until(lambda: got)
        goes_on.set()
        service.daemon.stop()
        thread.join(60)
    assert "though its processes were ended" in got[0][1]["text"] and "restart the service" in got[0][1]["text"]
    assert service.events("stalled") and service.events("alert")[0] == got[0][1]["text"]


def test_a_disk_that_hangs_keeps_people_from_hearing_of_it_no_more_than_the_end_of_children(world, child, monkeypatch):
    monkeypatch.setattr(stalls, "TELL_SECONDS", 0.01)
    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        service = world("service.stall_hours=1")
        service.daemon._open_ledger()
        hangs = threading.Event()
        monkeypatch.setattr(type(service.store), "event", lambda *_: hangs.wait())
        hung = child()
        looks = threading.Thread(target=lambda: [look_much_later(service) for _ in range(2)], daemon=True)
        looks.start()
        until(lambda: got)
        until(lambda: not hung.alive)
        hangs.set()
        looks.join(60)
    assert "restart the service" in got[0][1]["text"]


def test_the_limit_is_never_below_those_of_engine_and_trainer(world):
    service = world("service.stall_hours=1", "train.silence=10800")
    look_much_later(service)
    assert not service.daemon._stalls.count
