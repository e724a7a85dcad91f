"""One child: its orders, its answers, and the ways in which it fails."""

import sys
import threading
import time

import pytest
from child_world import gone, start
from outside import until

from selfplay.processes.child import ChildDied, ChildError, wait_for_any


def test_orders_results_errors_and_the_log(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    seen = []
    assert child.order("add", seen.append, a=1, b=2) == 3
    assert [event["done"] for event in seen] == [1]
    with pytest.raises(ChildError, match="unknown order") as error:
        child.order("subtract")
    assert (error.value.kind, error.value.hint) == ("input", "send «add»")
    assert child.order("add", a=2, b=2) == 4
    until(lambda: "a library's print" in (tmp_path / "echo.log").read_text())  # the log has a way of its own
    child.stop()
    child.stop()
    assert gone(tmp_path)


def test_a_child_works_in_a_process_of_many_descriptors(tmp_path, many_descriptors):
    child = start(tmp_path)
    child.wait_for("ready")
    number = child.send("add", a=1, b=2)
    events = []
    while not events:
        wait_for_any([child], 60)
        events = child.heard()
    assert events[0]["id"] == number
    child.stop()


def test_an_answer_to_an_abandoned_order_is_not_taken_for_another(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    child.send("add", a=1, b=1)
    assert child.order("add", a=5, b=5) == 10
    child.stop()


def test_a_child_that_says_nothing_is_ended(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    child.silence = 1.0  # its imports may take longer
    with pytest.raises(ChildDied, match="said nothing for 1 s"):
        child.order("hang")
    assert gone(tmp_path)


def test_a_child_that_takes_no_order_is_ended(tmp_path):
    deaf = "import time; from selfplay.processes.protocol import protocol; protocol().ready(); time.sleep(300)"
    child = start(tmp_path, [sys.executable, "-c", deaf])
    child.wait_for("ready")
    child.silence = 1.0
    with pytest.raises(ChildDied, match="said nothing for 1 s"):
        child.send("add", rows="x" * 1_000_000)  # more than a pipe holds
    assert gone(tmp_path)


def test_a_large_answer_that_nobody_waits_for_is_no_deadlock_with_a_large_order(tmp_path):
    echo = """
from selfplay.processes.protocol import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    channel.result(order, order["rows"])
"""
    child = start(tmp_path, [sys.executable, "-c", echo], silence=60.0)
    child.wait_for("ready")
    child.send("echo", rows="x" * 1_000_000)
    assert child.order("echo", rows="y" * 1_000_000) == "y" * 1_000_000
    child.stop()


def test_a_program_that_cannot_start_is_a_dead_child(tmp_path):
    child = start(tmp_path, ["/nonexistent/program"])
    with pytest.raises(ChildDied, match="exit code 127"):
        child.wait_for("ready")
    assert "cannot run /nonexistent/program" in (tmp_path / "echo.log").read_text()


def test_a_child_outlives_the_thread_that_started_it(tmp_path):
    started = []
    thread = threading.Thread(target=lambda: started.append(start(tmp_path)))
    thread.start()
    thread.join()
    started[0].wait_for("ready")
    time.sleep(0.3)
    assert started[0].order("add", a=1, b=1) == 2
    started[0].stop()


def test_an_exit_code_that_is_no_signal_is_told_as_it_is(tmp_path):
    child = start(tmp_path, [sys.executable, "-c", "import os; os._exit(255)"])
    with pytest.raises(ChildDied, match="ended with exit code 255"):
        child.wait_for("ready")


def test_what_a_launcher_prints_among_the_answers_goes_to_the_log(tmp_path):
    chatty = """
import os
from selfplay.processes.protocol import protocol
out = os.dup(1)
channel = protocol()
channel.ready()
for order in channel.orders():
    os.write(out, b"{a launcher's print}" + bytes([10, 10]))
    channel.result(order, "done")
"""
    child = start(tmp_path, [sys.executable, "-c", chatty])
    child.wait_for("ready")
    assert child.order("work") == "done"
    assert (tmp_path / "echo.log").read_text() == "{a launcher's print}\n\n"
    child.stop()
