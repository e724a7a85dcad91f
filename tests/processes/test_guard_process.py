"""The guard: whatever is killed, nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_world import ECHO, LAUNCHER, gone, start

from selfplay.cluster.host import AGAIN
from selfplay.processes.child import ChildDied
from selfplay.processes.reaping import RUN_MARKER, descendants, marked, reap


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


CONTROLLER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from selfplay.processes.child import Child
child = Child("echo", [sys.executable, "-c", {launcher!r}, {echo!r}], run_dir=Path({run!r}), log=Path({run!r}) / "echo.log")
child.start()
child.wait_for("ready")
print("up", flush=True)
{end}
"""


@pytest.mark.slow
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


def test_below_two_guards_and_a_long_temporary_folder_sockets_keep_short_paths(tmp_path):
    """A path of a socket has 107 bytes, and the name of a socket of vLLM 37 of them."""
    temporary = tmp_path / ("t" * max(1, 60 - len(os.fsencode(tmp_path)) - 1))
    temporary.mkdir()
    shown = (
        "import os, tempfile; print(os.environ.get('VLLM_RPC_BASE_PATH', tempfile.gettempdir()), os.environ['TMPDIR'])"
    )
    guard = [sys.executable, "-m", "selfplay.processes.guard"]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_RPC_BASE_PATH"}
    done = subprocess.run(
        [*guard, str(os.getpid()), "--", *AGAIN, sys.executable, "-c", shown],
        env=environment | {"TMPDIR": str(temporary), RUN_MARKER: str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    sockets, own = map(Path, done.stdout.split())
    assert sockets == own.parent == temporary
    assert not list(temporary.iterdir()), "both folders go"
