"""Children on a real Ray cluster of two nodes: they are placed, lost with their node and placed anew, and nothing is left.

Whole rounds there, with engines and a trainer over both nodes, are compared with those of one machine by
`scripts/chaos_cluster.py`: they take minutes.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_world import ECHO, gone
from cluster_world import TwoNodes, left_on, two_nodes, until
from mini import TINY

from selfplay.checks.cluster import nodes as look
from selfplay.cluster.placing import Nodes
from selfplay.config import Config, load
from selfplay.processes.child import Child, ChildDied

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

CPUS = 6
CONTROLLER = """
import sys, time
from pathlib import Path
from selfplay.cluster.placing import Nodes
from selfplay.config import load
from selfplay.processes.child import Child
config, run = load(Path(sys.argv[1]), [f"cluster.address={sys.argv[2]}"]), Path(sys.argv[3])
nodes = Nodes(config.cluster, lambda: config, run, print)
child = Child("echo", [sys.executable, "-c", sys.argv[4]], run_dir=run, log=run / "echo.log", place=nodes.of("engine"))
child.start()
child.wait_for("ready")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    with two_nodes(0, CPUS, CPUS) as found:
        yield found


def tiny(cluster: TwoNodes, *more: str) -> Config:
    return load(TINY, [f"cluster.address={cluster.address}", *more])


@pytest.fixture
def nodes(cluster: TwoNodes, tmp_path: Path) -> Iterator[tuple[Nodes, list[str]]]:
    config, said = tiny(cluster, "cluster.wait=600", f"cluster.engine.cpus={CPUS}", "generate.engines=2"), list[str]()
    assert config.cluster is not None
    found = Nodes(config.cluster, lambda: config, tmp_path, said.append)
    yield found, said
    found.close()
    assert left_on(cluster) == []


def test_a_child_is_lost_with_its_node_and_placed_anew(
    cluster: TwoNodes, nodes: tuple[Nodes, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = nodes
    monkeypatch.setattr("selfplay.cluster.placing.TELL", 1.0)

    def start(number: int) -> Child:
        log = tmp_path / f"{number}.log"
        argv = [sys.executable, "-c", ECHO]
        child = Child("echo", argv, run_dir=tmp_path, log=log, place=place.of("engine", number), silence=120.0)
        child.start()
        return child

    both = [start(0), start(1)]  # each fills a node
    for child in both:
        child.wait_for("ready")
        assert child.order("add", a=1, b=2) == 3
    cluster.kill(cluster.nodes[0])
    until(lambda: not all(child.alive for child in both), "the loss of one")
    (lost,) = [number for number, child in enumerate(both) if not child.alive]
    with pytest.raises(ChildDied, match="lost with its node"):
        both[lost].wait_for("never")
    assert both[1 - lost].order("add", a=1, b=2) == 3, "the other one goes on"
    again = start(lost)
    until(lambda: said, "a word about the wait")
    assert said[0].startswith("the engine waits for room: it needs 2 × 6 CPU; ")
    cluster.add(CPUS)
    again.wait_for("ready")
    assert again.order("add", a=2, b=2) == 4
    for child in (again, both[1 - lost]):
        child.stop()
    assert said[-1] == "the engine has room now"
    assert gone(tmp_path)


def test_nothing_is_left_of_a_controller_that_was_killed(cluster: TwoNodes, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", CONTROLLER, str(TINY), cluster.address, str(tmp_path), ECHO]
    controller = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert controller.stdout is not None
    try:
        while controller.stdout.readline() != "ready\n":
            assert controller.poll() is None
    finally:
        controller.send_signal(signal.SIGKILL)
        controller.communicate()
    assert gone(tmp_path, within=60.0)
    assert left_on(cluster) == []


def test_each_node_says_what_it_sees(cluster: TwoNodes, tmp_path: Path) -> None:
    files = ["evaluate.judge=null", "reward={model: null, rules: [{rule: length, max: 9}]}"]
    found = list(look(tiny(cluster, *files), tmp_path / "not" / "there" / "yet"))
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert found[1].text == f"3 nodes see {tmp_path} and have the same packages"
    assert not list(tmp_path.iterdir()), "the file that was read is gone"
    (first, *_) = look(tiny(cluster, "cluster.engine.cpus=7", *files), tmp_path)
    assert (first.level, first.about) == ("error", "cluster.engine")
