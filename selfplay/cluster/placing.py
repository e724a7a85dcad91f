"""Where the children of each role are put: a placement group a role, a bundle a child, kept for the whole run."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.cluster.hosted import Hosted, HostLost, NeverUp, Remote
from selfplay.config import ClusterConfig, Config
from selfplay.errors import ConfigError, InputError
from selfplay.processes.places import HERE, Place, Places, Process
from selfplay.training import launch

TELL = 30.0  # Seconds between two words about a child that waits for room.
LOOK = 0.5  # Seconds between two looks whether there is room, or nobody wants it any more.

Tell = Callable[[str], None]


def load_driver() -> Any:
    """The module that uses Ray. Raises ConfigError where that is not installed."""
    try:
        return importlib.import_module("selfplay.cluster.driver")
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "the section cluster needs Ray, which is not installed", 'pip install "selfplay[cluster]", on every node'
        ) from None


def connected(address: str) -> Any:
    """The same module, connected. Raises InputError where no cluster answers."""
    found = load_driver()
    try:
        found.connect(address)
    except found.Unreachable as error:
        raise InputError(
            f"cluster.address: no Ray cluster answers at {address}: {error}",
            "start one (ray start --head), or correct the address; all nodes need the same version of Ray and of Python, and the "
            "token of the cluster where it has one (RAY_AUTH_TOKEN, or ~/.ray/auth_token)",
        ) from error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What the children of a role take."""

    children: int
    cpus: int
    gpus: int
    """Of each child."""
    spread: bool
    apart: bool = False
    """They are one child on several nodes."""
    workers: int = 0
    """Processes with a GPU each, for which each child asks Ray by itself."""

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each child takes, as Ray counts it."""
        each: dict[str, float] = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return [each] * self.children

    @property
    def strategy(self) -> str:
        """How Ray is to spread them."""
        return "STRICT_SPREAD" if self.apart and self.children > 1 else "SPREAD" if self.spread else "PACK"

    def __str__(self) -> str:
        each = f"{self.cpus} CPU" + (f" and {self.gpus} GPU" if self.gpus else "")
        each += f" and {self.workers} workers with 1 GPU" if self.workers else ""
        where = " on as many nodes" if self.strategy == "STRICT_SPREAD" else ""
        return f"{self.children} × {each}{where}"


def needs(config: Config, with_gpus: bool) -> dict[str, Need]:
    """What each role takes at the same time; `with_gpus`: whether the cluster has any. Roles without a child are left out."""
    cluster = config.cluster
    assert cluster is not None
    nodes = cluster.trainer.nodes
    usual = {
        "engine": config.generate.engine.tensor_parallel,
        "trainer": launch.read(config.train.accelerate).processes // nodes,
    }
    roles = {"engine": config.generate.engine_count, "trainer": nodes}
    roles["reward"] = sum(not source.url for source in config.reward_sources().values())
    roles["judge"] = sum(not source.url for source in config.judge_sources().values())
    for suite in config.evaluate.suites:
        roles[f"suite-{suite.name}"] = sum(not source.url for source in config.suite_sources(suite).values())
    found = {}
    for role, children in roles.items():
        settings = cluster.role(role)
        gpus = settings.gpus if settings.gpus is not None else usual.get(role, 1) if with_gpus else 0
        workers = usual[role] * config.engine_nodes if role == "engine" and config.engine_nodes > 1 else 0
        need = Need(
            children=children,
            cpus=settings.cpus,
            gpus=0 if workers else gpus,
            spread=settings.spread,
            apart=role == "trainer",
            workers=workers,
        )
        if children:
            found[role] = need
    return found


@contextlib.contextmanager
def places(config: Callable[[], Config], run_dir: Path, tell: Tell) -> Iterator[Places]:
    """Where the children of a run are started, as its configuration says, and the end of all that is on other nodes.

    `tell` takes what a child waits for; any thread may call it. Raises ConfigError and InputError.
    """
    if (cluster := config().cluster) is None:
        yield HERE
        return
    nodes = Nodes(cluster, config, run_dir, tell)
    try:
        yield nodes
    finally:
        nodes.close()


class Nodes:
    """The nodes of a cluster, as `processes.places.Places`."""

    def __init__(self, cluster: ClusterConfig, config: Callable[[], Config], run_dir: Path, tell: Tell) -> None:
        """Connects. `config` is asked at each start. Raises ConfigError and InputError."""
        self._cluster, self._config, self.tell = cluster, config, tell
        self._run = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
        self._driver = connected(cluster.address)
        self._groups: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._closed = self._with_gpus = False
        atexit.register(self.close)  # before Ray's own end: what is registered later is called earlier

    def of(self, role: str, number: int = 0) -> Place:
        return _At(self, role, number)

    def close(self) -> None:
        """Give all room back. What still runs there ends."""
        atexit.unregister(self.close)
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for group in self._groups.values():
                group.remove()
        self._driver.disconnect()

    def take(self, role: str, number: int, given_up: threading.Event) -> list[Remote]:
        """Wait until there is room for a child, and start its hosts. Raises HostLost."""
        need = self._need(role)
        waiting = _Waiting(self, role, need, given_up)
        group = self._group(role, need)
        while not group.ready(LOOK):
            waiting.look()

        def ask(one: int) -> Any:
            return group.host(one, f"{self._run}/{role}/{one}")

        found: dict[int, Any] = {}
        try:
            for one in range(need.children) if need.apart else [number]:
                found[one] = ask(one)
            for one in found:
                while True:
                    try:
                        if self._driver.is_up(found[one], LOOK):
                            break
                    except NeverUp:  # Ray knows by now that the node is gone, and keeps other room for it
                        given_up.wait(LOOK)
                        found[one] = ask(one)
                    waiting.look()
        except HostLost:
            for handle in found.values():
                self._driver.Actor(handle).kill()
            raise
        waiting.over()
        return [self._driver.Actor(handle) for handle in found.values()]

    def missing(self, need: Need) -> str:
        """What a child waits for, and what there is."""
        there = self._driver.nodes()
        total = " + ".join(_amounts(node["resources"]) for node in there.values()) or "nothing"
        return f"it needs {need}; {len(there)} nodes have {total}, and {_amounts(self._driver.free())} is free"

    @property
    def patience(self) -> float:
        return self._cluster.wait

    def _need(self, role: str) -> Need:
        there = self._driver.nodes().values()
        self._with_gpus |= any(node["resources"].get("GPU") for node in there)  # those that are gone come back
        return needs(self._config(), self._with_gpus)[role]

    def _group(self, role: str, need: Need) -> Any:
        with self._lock:
            if self._closed:
                raise HostLost("was not started: the run is at its end")
            group = self._groups.get(role)
            if group is not None and group.bundles != need.bundles:  # the configuration is another one now
                group.remove()
                group = None
            if group is None:
                group = self._groups[role] = self._driver.Group(need.bundles, need.strategy)
            return group


class _At:
    """The place of one child."""

    def __init__(self, nodes: Nodes, role: str, number: int) -> None:
        self._nodes, self._role, self._number = nodes, role, number

    def start(self, argv: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
        return Hosted(self, argv, variables, log)

    def take(self, given_up: threading.Event) -> list[Remote]:
        return self._nodes.take(self._role, self._number, given_up)


class _Waiting:
    """A child that waits for room: says so now and then, and ends the wait where it is too long or nobody wants it."""

    def __init__(self, nodes: Nodes, role: str, need: Need, given_up: threading.Event) -> None:
        self._nodes, self._role, self._need, self._given_up = nodes, role, need, given_up
        self._began = self._told = time.monotonic()
        self._said = False

    def look(self) -> None:
        """Raises HostLost at the end of the wait."""
        now = time.monotonic()
        if self._given_up.is_set():
            raise HostLost("was not wanted any more")
        if now - self._began > self._nodes.patience:
            raise HostLost(
                f"found no room in {self._nodes.patience:.0f} s (cluster.wait): {self._nodes.missing(self._need)}"
            )
        if now - self._told > TELL:
            self._told, self._said = now, True
            self._nodes.tell(f"the {self._role} waits for room: {self._nodes.missing(self._need)}")

    def over(self) -> None:
        if self._said:
            self._nodes.tell(f"the {self._role} has room now")


def _amounts(resources: Mapping[str, float]) -> str:
    told = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return " and ".join(told) or "nothing"
