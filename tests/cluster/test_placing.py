"""A child that waits for room: how long, what is said meanwhile, and how the wait ends. Ray itself is asked in test_nodes.py."""

import threading
from pathlib import Path
from typing import Any

import pytest
from mini import TINY

from selfplay.cluster import placing
from selfplay.cluster.hosted import HostLost, NeverUp
from selfplay.cluster.placing import Nodes
from selfplay.config import load


class Shrunk:
    """A cluster of which one node is left for good. No host starts there any more."""

    def __init__(self, ready: bool) -> None:
        self._ready, self.asked, self.killed = ready, list[str](), list[str]()

    def nodes(self) -> dict[str, Any]:
        return {"a": {"address": "10.0.0.1", "resources": {"CPU": 4.0}}}

    def free(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def disconnect(self) -> None:
        pass

    def Group(self, bundles: Any, strategy: str) -> Any:
        shrunk = self

        class Group:
            def __init__(self) -> None:
                self.bundles = bundles

            def ready(self, seconds: float) -> bool:
                return shrunk._ready

            def host(self, number: int, name: str) -> str:
                shrunk.asked.append(name.rpartition("/")[2])
                return name

            def remove(self) -> None:
                pass

        return Group()

    def is_up(self, handle: str, seconds: float) -> bool:
        return False

    def Actor(self, handle: str) -> Any:
        shrunk = self

        class Actor:
            def kill(self) -> None:
                shrunk.killed.append(handle)

        return Actor()


@pytest.mark.parametrize("ready", [False, True])
def test_a_cluster_that_shrinks_for_good_is_a_child_that_finds_no_room(
    ready: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the room was never there, or is lost since: then Ray has the host wait for it."""
    shrunk, said = Shrunk(ready), list[str]()
    monkeypatch.setattr(placing, "connected", lambda address: shrunk)
    monkeypatch.setattr(placing, "TELL", 0.1)
    config = load(TINY, ["cluster.address=auto", "cluster.wait=0.5", "cluster.engine.cpus=6", "generate.engines=2"])
    assert config.cluster is not None
    nodes = Nodes(config.cluster, lambda: config, tmp_path, said.append)
    what = r"it needs 2 × 6 CPU; 1 nodes have 4 CPU, and 1 CPU is free"
    with pytest.raises(HostLost, match=rf"^found no room in 0 s \(cluster.wait\): {what}$"):
        nodes.take("engine", 1, threading.Event())
    assert said[0] == f"the engine waits for room: {what}"
    assert [name.rpartition("/")[2] for name in shrunk.killed] == ["1"] * ready, "no host is left that waits"
    given_up = threading.Event()
    given_up.set()
    with pytest.raises(HostLost, match="was not wanted any more"):
        nodes.take("engine", 1, given_up)
    nodes.close()
    with pytest.raises(HostLost, match="the run is at its end"):
        nodes.take("reward", 0, threading.Event())


class Late(Shrunk):
    """A cluster that puts a host on a node whose end it has not noticed yet; the one that is asked for after that starts."""

    def is_up(self, handle: str, seconds: float) -> bool:
        if len(self.asked) == 1:
            raise NeverUp("was lost with its node")
        return True


def test_a_host_that_was_put_on_a_node_that_is_gone_is_asked_for_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Late(ready=True)
    monkeypatch.setattr(placing, "connected", lambda address: late)
    config = load(TINY, ["cluster.address=auto", "cluster.wait=60", "generate.engines=2"])
    assert config.cluster is not None
    nodes = Nodes(config.cluster, lambda: config, tmp_path, lambda text: None)
    assert len(nodes.take("engine", 1, threading.Event())) == 1
    assert (late.asked, late.killed) == (["1", "1"], [])
    nodes.close()
