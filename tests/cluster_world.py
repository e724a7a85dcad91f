"""A real Ray cluster of several nodes on this machine, as small as it can be, and ways to kill one of them."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0", RAY_worker_niceness="0")

import ray
import ray.util
from ray.cluster_utils import Cluster

from selfplay.processes.reaping import descendants

STORE = 80 << 20  # the least that Ray takes, in bytes
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 5_000, "health_check_failure_threshold": 3}


class TwoNodes:
    """A head, on which the controller runs, and other nodes. Ray's processes are children of this one."""

    def __init__(self, *cpus: int) -> None:
        """`cpus`: those of the head and of each further node."""
        self._cpus, self._port = cpus, 0
        self.start()

    def start(self) -> None:
        """Start the head and the nodes. After `close` they are other ones, at the address of the first."""
        self._started = 0
        head = {"num_cpus": self._cpus[0], "include_dashboard": False, "_system_config": QUICK, **self._next()}
        self._cluster = Cluster(
            initialize_head=True, head_node_args=head | ({"gcs_server_port": self._port} if self._port else {})
        )
        self._port = int(self.address.rpartition(":")[2])
        self.nodes: list[str] = []  # their addresses
        for count in self._cpus[1:]:
            self.add(count)

    def _next(self) -> dict[str, Any]:
        """Each node has a loopback address of its own. For 127.0.0.1 Ray would take that of the machine."""
        self._started += 1
        return {"object_store_memory": STORE, "node_ip_address": f"127.0.0.{1 + self._started}"}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, cpus: int) -> str:
        """Start a further node, and return its address. Ray waits for it for 30 seconds, which is too little on a busy machine."""
        how = self._next()
        address: str = how["node_ip_address"]
        try:
            self._cluster.add_node(num_cpus=cpus, **how)
        except Exception as error:  # Ray has no type of its own for it
            until(lambda: address in self._alive(), f"the node {address}, of which Ray says: {error}", seconds=300.0)
        self.nodes.append(address)
        return address

    def _alive(self) -> list[str]:
        return [each["NodeManagerAddress"] for each in self._cluster.global_state.node_table() if each["Alive"]]

    def kill(self, node: str) -> int:
        """SIGKILL a node's raylet and all of its workers; returns how many processes that were."""
        commands = {pid: _command(pid).split(b"\0") for pid in descendants(os.getpid())}
        own = f"--node_ip_address={node}".encode()
        (raylet,) = [pid for pid, words in commands.items() if words[0].endswith(b"/raylet") and own in words]
        victims = [raylet, *(pid for pid in descendants(raylet) if b"ray::" in _command(pid))]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.nodes.remove(node)
        return len(victims)

    def kill_head(self) -> None:
        """SIGKILL all that Ray has on the head, the store of the cluster's state included. The other nodes end by themselves."""
        address = self.address.rpartition(":")[0].encode()
        head = {b"--node_ip_address=" + address, b"--node-ip-address=" + address}
        for pid in descendants(os.getpid()):
            if head.intersection(_command(pid).split(b"\0")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self._cluster.shutdown()


def left_on(cluster: TwoNodes) -> list[str]:
    """Actors and placement groups that are still there some seconds after their controller has ended, in words."""
    ray.init(cluster.address, namespace="another", log_to_driver=False, logging_level="error")
    try:
        deadline = time.monotonic() + 30
        while True:
            actors = [each for each in ray._private.state.actors().values() if each["State"] != "DEAD"]
            groups = [each for each in ray.util.placement_group_table().values() if each["state"] != "REMOVED"]
            if not (actors or groups) or time.monotonic() > deadline:
                return [f"the actor {each} is left" for each in actors] + [
                    f"the group {each} is left" for each in groups
                ]
            time.sleep(0.2)
    finally:
        ray.shutdown()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def two_nodes(*cpus: int) -> Iterator[TwoNodes]:
    before = set(descendants(os.getpid()))
    cluster = TwoNodes(*cpus)
    try:
        yield cluster
    finally:
        cluster.close()
        until(lambda: not set(descendants(os.getpid())) - before, "the end of Ray's processes")


def until(condition: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.1)
