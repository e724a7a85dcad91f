"""What concerns all children of a process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_world import start

from selfplay.processes import children, scratch
from selfplay.processes.child import ChildDied
from selfplay.processes.guard import PR_SET_CHILD_SUBREAPER
from selfplay.processes.reaping import marked


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


def test_children_are_heard_when_they_write(tmp_path):
    child = start(tmp_path)
    child.wait_for("ready")
    before = children.heard()
    assert 0 < before <= time.monotonic()
    child.order("add", a=1, b=2)
    assert before < children.heard() <= time.monotonic()
    child.stop()


def test_all_children_end_together(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    both = [start(folder) for folder in folders]
    children.end_running()
    for child in both:
        with pytest.raises(ChildDied):
            child.wait_for("nothing")
    both = [start(folder) for folder in folders]
    children.stop_all()
    assert not any(child.alive for child in both) and not any(marked(folder) for folder in folders)


def test_a_guard_leaves_nothing_to_reap(tmp_path):
    child = (
        "import subprocess, threading, time; large = bytearray(300 << 20)\n"  # It takes a while to die.
        "for _ in range(32): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "for _ in range(3): subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print('started', flush=True); time.sleep(600)"
    )
    parent = f"""
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl({PR_SET_CHILD_SUBREAPER}, 1)  # As the first process of a container: what is left comes to it.
for _ in range(3):
    argv = [sys.executable, "-m", "selfplay.processes.guard", str(os.getpid()), "--", sys.executable, "-c", {child!r}]
    guard = subprocess.Popen(argv, stdout=subprocess.PIPE)
    guard.stdout.readline()
    guard.send_signal(signal.SIGUSR1)
    guard.wait()
    try:
        raise SystemExit(f"left: {{os.waitpid(-1, 0)}}")
    except ChildProcessError:
        pass
"""
    subprocess.run(
        [sys.executable, "-c", parent], check=True, env=os.environ | scratch.variables(tmp_path), timeout=120
    )
