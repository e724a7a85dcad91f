"""A child behind a host does what a child of this machine does. Ray's part, the call of a method, is a plain call here."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from child_world import ECHO, gone
from outside import until

from selfplay.cluster.host import Host
from selfplay.cluster.hosted import Hosted, HostLost, Remote, handed_on
from selfplay.processes import children
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.places import ADDRESS, NODE, PORT

PYTHON = [sys.executable, "-c"]
DEAF = "import time; from selfplay.processes.protocol import protocol; protocol().ready(); time.sleep(300)"
LARGE = """
from selfplay.processes.protocol import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    channel.result(order, order["rows"])
"""
# What one of several nodes does: the first takes orders, and they end together.
NODES = """
import sys, time
from selfplay.processes.protocol import protocol
channel = protocol()
if sys.argv[1] == "0":
    channel.ready(address=sys.argv[2], port=sys.argv[3])
    for order in channel.orders():
        channel.result(order, sys.argv[1])
else:
    for _ in range(int(sys.argv[4])):
        channel.send({"event": "joined", "node": sys.argv[1]})
        time.sleep(0.1)
    sys.exit(3)
"""


class Direct:
    """A host without an actor: `kill` ends its child, as the end of the actor would."""

    def __init__(self) -> None:
        self.host, self.lost = Host(["7", "GPU-8"], "127.0.0.1"), False

    def call(self, method: str, *args: Any) -> Any:
        if self.lost:
            raise HostLost("was lost with its node")
        found = getattr(self.host, method)(*args)
        if self.lost:
            raise HostLost("was lost with its node")
        return found

    def kill(self) -> None:
        self.lost = True
        if self.host._child is not None and self.host._child.poll() is None:
            self.host._child.send_signal(signal.SIGUSR1)


class Seated:
    """A place with room for one child, on one host or on several."""

    def __init__(self, hosts: int = 1, full: str = "") -> None:
        self.hosts, self._full = [Direct() for _ in range(hosts)], full

    def start(self, argv: Any, variables: Any, log: Path) -> Hosted:
        return Hosted(self, argv, variables, log)

    def take(self, given_up: threading.Event) -> list[Remote]:
        if self._full:
            raise HostLost(self._full)
        return list(self.hosts)


def start(tmp_path: Path, argv: list[str], place: Seated | None = None, **settings: Any) -> Child:
    child = Child("echo", argv, run_dir=tmp_path, log=tmp_path / "echo.log", place=place or Seated(), **settings)
    child.start()
    return child


def test_orders_results_errors_and_the_log(tmp_path: Path) -> None:
    child, seen = start(tmp_path, [*PYTHON, ECHO]), []
    child.wait_for("ready")
    assert child.order("add", seen.append, a=1, b=2) == 3
    assert [event["done"] for event in seen] == [1]
    with pytest.raises(ChildError, match="unknown order"):
        child.order("subtract")
    until(lambda: "a library's print" in (tmp_path / "echo.log").read_text())  # the log has a way of its own
    child.stop()
    child.stop()
    assert gone(tmp_path)


@pytest.mark.slow
def test_large_orders_and_answers_cross_each_other(tmp_path: Path) -> None:
    child = start(tmp_path, [*PYTHON, LARGE], silence=60.0)
    child.wait_for("ready")
    child.send("echo", rows="x" * 3_000_000)
    assert child.order("echo", rows="y" * 3_000_000) == "y" * 3_000_000
    child.stop()


def test_deadlines_are_those_of_a_child_of_this_machine(tmp_path: Path) -> None:
    child = start(tmp_path, [*PYTHON, DEAF])
    child.wait_for("ready")
    child.silence = 1.0
    with pytest.raises(ChildDied, match="said nothing for 1 s"):
        child.order("add", rows="x" * 5_000_000)  # more than the pipes on the way hold
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"), [("exit", "exit code 5"), ("kill", "SIGKILL"), ("node", "lost with its node")]
)
def test_how_it_ended_is_told(tmp_path: Path, how: str, words: str) -> None:
    ends = "import os, signal; " + ("os._exit(5)" if how == "exit" else "os.kill(os.getpid(), signal.SIGKILL)")
    place = Seated()
    child = start(tmp_path, [*PYTHON, ECHO if how == "node" else ends], place)
    if how == "node":
        child.wait_for("ready")
        place.hosts[0].kill()
    with pytest.raises(ChildDied, match=words):
        child.wait_for("ready")
    assert gone(tmp_path)


@pytest.mark.slow
def test_of_the_secrets_of_its_node_it_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `address: local` the node has the environment of the service."""
    names = ("MY_TOKEN", "MY_KEY", "HF_TOKEN", "MY_WORD")
    for name in names:
        monkeypatch.setenv(name, "secret")
    monkeypatch.setattr(children, "_withheld", set())  # of a host, which is this process too
    monkeypatch.setattr(
        children, "withheld", lambda: frozenset({"MY_TOKEN", "MY_KEY", "HF_TOKEN"})
    )  # of the controller
    tells = (
        "import os; from selfplay.processes.protocol import protocol; "
        f"protocol().ready(found=[name for name in {names} if name in os.environ])"
    )
    for own in ((), ("MY_KEY",), ("MY_KEY", "HF_TOKEN")):
        child = start(tmp_path, [*PYTHON, tells], env=children.owning(*own))
        assert child.wait_for("ready")["found"] == [*own, "MY_WORD"]
        child.stop()


@pytest.mark.slow
def test_a_program_that_takes_no_orders_is_waited_for(tmp_path: Path) -> None:
    assert start(tmp_path, [*PYTHON, "print('done')"]).wait() == 0
    assert "done" in (tmp_path / "echo.log").read_text()


@pytest.mark.slow
def test_everything_is_cut_at_once(tmp_path: Path) -> None:
    child = start(tmp_path, [*PYTHON, ECHO])
    child.wait_for("ready")
    children.end_running()
    with pytest.raises(ChildDied):
        child.order("hang")
    assert gone(tmp_path)


def test_no_room_and_no_folder_are_told_in_the_log_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start(tmp_path, [*PYTHON, ECHO], Seated(full="found no room in 1 s"))
    with pytest.raises(ChildDied, match="the echo process found no room in 1 s"):
        child.wait_for("ready")
    monkeypatch.setattr(os, "chdir", lambda folder: os.stat("/nonexistent"))  # as where storage is not mounted
    child = start(tmp_path, [*PYTHON, ECHO])
    with pytest.raises(ChildDied, match=r"cannot start on its node, which needs .* and the run folder"):
        child.wait_for("ready")
    assert "found no room" in (tmp_path / "echo.log").read_text()
    assert "/nonexistent" in (tmp_path / "echo.log").read_text()


def test_why_it_ended_is_written_as_a_person_may_see_it_and_through_no_link(tmp_path: Path) -> None:
    """The text of an error of Ray may hold what the child printed."""
    other = tmp_path / "other.txt"
    (tmp_path / "echo.log").symlink_to(other)
    child = start(tmp_path, [*PYTHON, ECHO], Seated(full="found \x1b]0;mine\x07no room"))
    with pytest.raises(ChildDied):
        child.wait_for("ready")
    log = tmp_path / "echo.log"
    assert not other.exists() and not log.is_symlink() and log.read_text() == "it found �]0;mine�no room\n"


@pytest.mark.slow
def test_several_nodes_are_one_child(tmp_path: Path) -> None:
    place = Seated(2)
    child = start(tmp_path, [*PYTHON, NODES, NODE, ADDRESS, PORT, "3000"], place)
    ready = child.wait_for("ready")
    assert (ready["address"], int(ready["port"]) > 0) == ("127.0.0.1", True)
    assert child.order("node") == "0"
    assert child.wait_for("joined")["node"] == "1"  # what a further node says comes in the same way
    place.hosts[1].kill()
    with pytest.raises(ChildDied, match="lost with its node"):
        child.wait_for("never")
    assert gone(tmp_path)


@pytest.mark.slow
def test_a_node_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfplay.cluster.hosted.LAST", 0.2)
    child = start(tmp_path, [*PYTHON, NODES, NODE, ADDRESS, PORT, "0"], Seated(2))
    with pytest.raises(ChildDied, match="ended with exit code 3 on one of its nodes"):
        child.wait_for("never")
    assert gone(tmp_path)


def test_a_child_has_the_gpus_of_its_host_its_umask_and_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", "/shared/models")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for secret in ("HF_TOKEN", "VLLM_API_KEY"):
        monkeypatch.setenv(secret, "secret")
    assert handed_on()["HF_HOME"] == "/shared/models" and not {"HF_TOKEN", "VLLM_API_KEY"} & set(handed_on())
    assert handed_on()["TOKENIZERS_PARALLELISM"] == "false", "it has TOKEN in its name, and holds none"
    shown = (
        "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'], oct(os.umask(0)))"
    )
    before = os.umask(0o022)  # as a process of Ray may have it
    try:
        start(tmp_path, [*PYTHON, shown], env={"CUDA_VISIBLE_DEVICES": "0"}).wait()
    finally:
        os.umask(before)
    assert "7,GPU-8 PCI_BUS_ID 0o77" in (tmp_path / "echo.log").read_text()


@pytest.mark.slow
def test_a_host_that_hears_nothing_of_its_controller_ends_its_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfplay.cluster.host.LEASE", 0.5)
    host = Host([], "127.0.0.1")
    variables = {"SELFPLAY_GUARDED": "1", "SELFPLAY_RUN": str(tmp_path)}
    host.start([*PYTHON, "import time; time.sleep(300)"], variables, str(tmp_path / "log"), str(tmp_path))
    assert host._running.wait(60) == 137
    assert gone(tmp_path)


@pytest.mark.slow
def test_a_host_whose_child_nobody_listens_to_hears_of_its_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfplay.cluster.host.LEASE", 2.0)
    monkeypatch.setattr("selfplay.cluster.hosted.GREET", 0.2)
    child = start(tmp_path, [*PYTHON, LARGE])
    child.wait_for("ready")
    child.send("echo", rows="x" * 5_000_000)  # the answer fills all pipes on its way
    time.sleep(6.0)
    assert child.order("echo", rows="y") == "y"
    child.stop()


@pytest.mark.parametrize("kills", ["", "os.kill(host._child.pid, signal.SIGKILL)"])
def test_nothing_outlives_the_process_of_the_host(tmp_path: Path, kills: str) -> None:
    """As where a node dies, and as where a worker of Ray ends: that one kills its own children, the guard, before."""
    actor = f"""
import os, signal, time
from selfplay.cluster.host import Host
host = Host([], "127.0.0.1")
variables = {{"SELFPLAY_GUARDED": "1", "SELFPLAY_RUN": {str(tmp_path)!r}}}
host.start({[*PYTHON, ECHO]!r}, variables, {str(tmp_path / "log")!r}, {str(tmp_path)!r})
while b"ready" not in (host.read(10) or b""):
    pass
{kills}
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([*PYTHON, actor], timeout=120).returncode == -signal.SIGKILL
    assert gone(tmp_path)
