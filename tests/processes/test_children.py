"""Supervision, on trivial children: whatever is killed, nothing stays behind and nothing finished is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from daemon_world import until

from selfplay.processes import children
from selfplay.processes.children import Child, ChildDied, ChildError, descendants, marked, reap
from selfplay.storage import hashes

ECHO = """
import subprocess, sys
from selfplay.processes.children import protocol
channel = protocol()
print("a library's print")
grandchild = subprocess.Popen(["sleep", "300"], start_new_session=True)
channel.ready(grandchild=grandchild.pid)
for order in channel.orders():
    if order["order"] == "add":
        channel.progress(order, done=1)
        channel.result(order, order["a"] + order["b"])
    elif order["order"] == "hang":
        __import__("time").sleep(300)
    else:
        channel.error(order, "input", "unknown order", "send «add»")
"""
# What a launcher does: start the real child as a process of its own and wait for it.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"


def start(tmp_path: Path, argv: list[str] | None = None, **settings) -> Child:
    child = Child("echo", argv or [sys.executable, "-c", ECHO], run_dir=tmp_path, log=tmp_path / "echo.log", **settings)
    child.start()
    return child


def gone(tmp_path: Path, within: float = 20.0) -> bool:
    deadline = time.monotonic() + within
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(tmp_path)


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
    assert "a library's print" in (tmp_path / "echo.log").read_text()
    child.stop()
    child.stop()
    assert gone(tmp_path)


def test_an_answer_to_an_abandoned_order_is_not_taken_for_another(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    child.send("add", a=1, b=1)
    assert child.order("add", a=5, b=5) == 10
    child.stop()


@pytest.mark.parametrize("launcher", [False, True], ids=["direct", "behind a launcher"])
@pytest.mark.parametrize("victim", ["child", "guard"])
def test_a_killed_process_is_noticed_and_takes_its_grandchildren_along(tmp_path, launcher, victim):
    child = start(tmp_path, [sys.executable, "-c", LAUNCHER, ECHO] if launcher else None)
    grandchild = child.wait_for("ready")["grandchild"]
    assert grandchild in descendants(child.pid)
    below = [pid for pid in descendants(child.pid) if pid != grandchild]
    os.kill(child.pid if victim == "guard" else min(below), signal.SIGKILL)
    with pytest.raises(ChildDied, match="SIGKILL|exit code|closed its output"):
        for _ in range(1000):  # a child some levels below the guard may still answer before the news reaches it
            child.order("add", a=1, b=2)
    # With the guard gone a foreign grandchild may live on until the next start reaps it; our own processes do not.
    deadline = time.monotonic() + 20
    while set(marked(tmp_path)) - {grandchild} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(marked(tmp_path)) <= ({grandchild} if victim == "guard" else set())
    reap(tmp_path)
    assert gone(tmp_path)


def test_a_child_that_says_nothing_is_ended(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    child.silence = 1.0  # its imports may take longer
    with pytest.raises(ChildDied, match="said nothing for 1 s"):
        child.order("hang")
    assert gone(tmp_path)


def test_a_child_that_takes_no_order_is_ended(tmp_path):
    deaf = "import time; from selfplay.processes.children import protocol; protocol().ready(); time.sleep(300)"
    child = start(tmp_path, [sys.executable, "-c", deaf])
    child.wait_for("ready")
    child.silence = 1.0
    with pytest.raises(ChildDied, match="said nothing for 1 s"):
        child.send("add", rows="x" * 1_000_000)  # more than a pipe holds
    assert gone(tmp_path)


def test_a_large_answer_that_nobody_waits_for_is_no_deadlock_with_a_large_order(tmp_path):
    echo = """
from selfplay.processes.children import protocol
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


CONTROLLER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from selfplay.processes.children import Child
child = Child("echo", [sys.executable, "-c", {launcher!r}, {echo!r}], run_dir=Path({run!r}), log=Path({run!r}) / "echo.log")
child.start()
child.wait_for("ready")
print("up", flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["time.sleep(300)", "raise RuntimeError", "sys.exit(3)"])
def test_no_process_outlives_its_controller(tmp_path, end):
    root = str(Path(__file__).parents[2])
    code = CONTROLLER.format(root=root, launcher=LAUNCHER, echo=ECHO, run=str(tmp_path), end=end)
    controller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert controller.stdout.readline() == b"up\n"
    if "sleep" in end:
        deadline = time.monotonic() + 20
        while len(marked(tmp_path)) < 4 and time.monotonic() < deadline:  # a process has no environment while it starts
            time.sleep(0.01)
        assert len(marked(tmp_path)) == 4  # guard, launcher, child, grandchild
        controller.kill()
    controller.wait()
    controller.stdout.close()
    assert gone(tmp_path)


# Three stages, each done by a child; the controller records what it did and may be killed at any moment.
PIPELINE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from selfplay.storage import folders, hashes
from selfplay.processes.children import Child, reap
run = Path({run!r})
reap(run)
code = '''
import time
from pathlib import Path
from selfplay.processes.children import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    for i in range(5):
        time.sleep(0.02)
        with (Path(order["out"]) / "rows.txt").open("a") as file:
            file.write(f'{{order["stage"]}} {{i}}\\\\n')
    channel.result(order, 5)
'''
child = Child("worker", [sys.executable, "-c", code], run_dir=run, log=run / "worker.log")
child.start()
child.wait_for("ready")
for stage in ("one", "two", "three"):
    if (run / stage).is_dir():
        continue
    with folders.folder(run / stage) as folder:
        before = hashes.hash_files(run / "one") if stage != "one" else {{}}
        rows = child.order("work", stage=stage, out=str(folder))
        folders.write_json(folder / "manifest.json", {{"rows": rows, "before": before}})
child.stop()
"""


def test_killed_anywhere_and_run_again_the_result_is_the_same(tmp_path):
    def command(run: Path) -> subprocess.Popen:
        code = PIPELINE.format(root=str(Path(__file__).parents[2]), run=str(run))
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])

    def result(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for s in ("one", "two", "three") for p in (run / s).rglob("*")}

    calm = tmp_path / "calm"
    calm.mkdir()
    assert command(calm).wait() == 0
    rng, kills, storms = random.Random(0), 0, 0
    while kills < 3:  # a fast machine may finish a run between two kills: then another one is disturbed
        storms += 1
        assert storms < 20
        stormy = tmp_path / f"stormy-{storms}"
        stormy.mkdir()
        while True:
            process = command(stormy)
            try:
                assert process.wait(rng.uniform(0.05, 0.5 + 0.3 * kills)) == 0
                break
            except subprocess.TimeoutExpired:
                victims = [process.pid, *marked(stormy)]
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
                process.wait()
                assert gone(stormy)
            assert kills < 60
        assert result(stormy) == result(calm)
    assert json.loads((stormy / "three" / "manifest.json").read_text())["before"] == hashes.hash_files(calm / "one")
    assert not [p for p in stormy.iterdir() if p.name.endswith(".partial")]


def test_an_exit_code_that_is_no_signal_is_told_as_it_is(tmp_path):
    child = start(tmp_path, [sys.executable, "-c", "import os; os._exit(255)"])
    with pytest.raises(ChildDied, match="ended with exit code 255"):
        child.wait_for("ready")


def test_secrets_that_are_not_theirs_are_kept_from_children(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_withheld", set())
    monkeypatch.setenv("THE_TOKEN", "hush-hush")
    monkeypatch.setenv("THE_KEY", "theirs")
    children.withhold("THE_TOKEN", "NOT_SET")
    child = start(tmp_path)
    child.wait_for("ready")
    inside = [pid for pid in marked(tmp_path) if b"hush-hush" in Path(f"/proc/{pid}/environ").read_bytes()]
    theirs = [pid for pid in marked(tmp_path) if b"theirs" in Path(f"/proc/{pid}/environ").read_bytes()]
    child.stop()
    assert inside == [] and len(theirs) >= 2


def test_the_log_of_a_child_is_bounded_while_it_runs_and_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "LARGEST_LOG", 1000)
    monkeypatch.setattr(children, "LOG_SECONDS", 0.01)
    log, before = tmp_path / "echo.log", tmp_path / "echo.log.1"
    log.write_text("x" * 1001)
    child = start(tmp_path)
    child.wait_for("ready")
    assert before.read_text() == "x" * 1000
    with log.open("a") as file:
        file.write("y" * 3000 + "the end")
    until(lambda: before.read_text() == "y" * 993 + "the end")
    until(lambda: log.stat().st_size <= 1000)
    with log.open("a") as file:
        file.write("goes on")
    assert log.read_text() == "goes on"  # cut, not full of holes
    child.stop()


def test_a_log_that_has_filled_the_disk_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "LARGEST_LOG", 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    log = tmp_path / "echo.log"
    log.write_text("x" * 1001)
    children.bound_log(log)
    assert log.stat().st_size == 0
