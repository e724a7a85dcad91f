"""This process as a driver of a Ray cluster. The only module that imports Ray, which is an extra (`selfplay[cluster]`).

What a driver makes ends with it: Ray removes its actors and placement groups when its process is gone, even after SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a call after the end would start another cluster
# Of a local cluster: by default its children yield to all other work.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # `host` tells each child its GPUs

import grpc  # type: ignore[import-untyped]
import ray
from ray.exceptions import ActorAlreadyExistsError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from selfplay.cluster.host import Host
from selfplay.cluster.hosted import HostLost, NeverUp
from selfplay.processes.places import lasting

NAMESPACE = "selfplay"
LOCAL_STORE = 80 << 20  # Bytes of a local cluster's object store. Only lines of the protocol pass through it.
CALLS = 4  # Calls of a host at a time: one reads, one writes, one sends signals, and one waits for the end.
ANSWER = 30.0  # Seconds for a cluster to take a connection.
LOOK = 0.5  # Seconds before another try to take the name of a host that ends.

Bundle = Mapping[str, float]
Strategy = Literal["PACK", "SPREAD", "STRICT_SPREAD"]


class Unreachable(Exception):
    """No cluster answers at an address, or it is another version of Ray."""


class OnNode(Host):
    """A host in an actor of Ray, which gives it GPUs and knows the address of its node."""

    def __init__(self) -> None:
        cluster = ray.get_runtime_context().gcs_address
        super().__init__(ray.get_gpu_ids(), ray.util.get_node_ip_address(), cluster)

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


class Actor:
    """A host, as `hosted.Remote`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def call(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._handle, method).remote(*args))
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except RayActorError as error:
            raise HostLost("was lost with its node or its actor") from error
        except RayError as error:
            raise HostLost(f"was lost: {_first_line(error)}") from error

    def kill(self) -> None:
        with contextlib.suppress(RayError, ValueError):
            if ray.is_initialized():
                ray.kill(self._handle, no_restart=True)


def connect(address: str) -> None:
    """Become a driver of the cluster at `address`, or of a new one of this machine alone («local»). Raises Unreachable."""
    mine = {"object_store_memory": LOCAL_STORE, "include_dashboard": False} if address == "local" else {}
    try:
        _require_answer(address)
        # Not on the main thread, where Ray would take SIGTERM over.
        lasting(ray.init, address, namespace=NAMESPACE, log_to_driver=False, logging_level="error", **mine)
        with contextlib.suppress(ValueError):  # its handler of SIGTERM that prints a stack; only the main thread can
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
    except (ConnectionError, RayError, RuntimeError, ValueError, OSError) as error:
        raise Unreachable(_first_line(error)) from error


def _require_answer(address: str) -> None:
    """Raises OSError where nothing listens there, or something else than Ray. Ray itself would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or ray._private.utils.read_ray_address() or ""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), ANSWER).close()
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        host = f"[{found[1]}]" if ":" in found[1] else found[1]
        with grpc.insecure_channel(f"{host}:{found[2]}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                grpc.channel_ready_future(channel).result(ANSWER)
            except grpc.FutureTimeoutError:
                raise TimeoutError(f"what listens there did not answer as Ray does in {ANSWER:.0f} s") from None


def disconnect() -> None:
    """End everything that this driver has made on the cluster."""
    if ray.is_initialized():
        ray.shutdown()


def nodes() -> dict[str, dict[str, Any]]:
    """The living nodes by their ids: `address`, and `resources` in all."""
    return {
        node["NodeID"]: {"address": node["NodeManagerAddress"], "resources": node["Resources"]}
        for node in ray.nodes()
        if node["Alive"]
    }


def free() -> dict[str, float]:
    """What of the cluster's resources nobody has."""
    return {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}


def on_each_node(work: Callable[..., Any], *args: Any, seconds: float) -> dict[str, Any]:
    """What a function gives on each living node, or the exception that it raised there, by the node's id.

    It takes no resources. A node that does not answer in time has a TimeoutError.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(work)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*args)
        for node in nodes()
    }
    found: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except RayTaskError as error:
            found[node] = error.cause or error
        except (RayError, TimeoutError) as error:
            found[node] = error
    return found


class Group:
    """Room on nodes: bundles of resources that Ray keeps for a role, and moves to another node when one dies."""

    def __init__(self, bundles: Sequence[Bundle], strategy: Strategy) -> None:
        self.bundles = [dict(bundle) for bundle in bundles]
        self._group: PlacementGroup = placement_group(self.bundles, strategy=strategy)
        self._ready = self._group.ready()

    def ready(self, seconds: float) -> bool:
        """Whether all of it has been there once; waits that long for it. A host then waits for what is lost since."""
        return bool(ray.wait([self._ready], timeout=seconds)[0])

    def host(self, number: int, name: str) -> Any:
        """Ask for a host in a bundle; an earlier one of that name, of whatever controller, is ended first."""
        bundle = self.bundles[number]
        options = ray.remote(OnNode).options(
            name=name,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_concurrency=CALLS,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, number),
        )
        while True:
            try:
                return options.remote()
            except (ActorAlreadyExistsError, ValueError):
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)
                time.sleep(LOOK)

    def remove(self) -> None:
        with contextlib.suppress(RayError, ValueError):
            if ray.is_initialized():
                remove_placement_group(self._group)


def is_up(handle: Any, seconds: float) -> bool:
    """Whether a host has started; waits that long for it. Raises HostLost where it cannot start there, and NeverUp where its
    node is lost."""
    answer = handle.node.remote()
    if not ray.wait([answer], timeout=seconds)[0]:
        return False
    try:
        ray.get(answer)
    except RayActorError as error:
        if error.actor_init_failed:
            raise HostLost(f"cannot start on its node: {_last_line(error)}") from error
        raise NeverUp("was lost with its node") from error
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
