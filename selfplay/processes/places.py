"""Where a child is started: on this machine, or somewhere else (`selfplay.cluster`). A child is the same process everywhere.

A place starts `argv` under the guard, in a session of its own, with `log` as its stderr. What it returns is used as a process of
`subprocess` is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, ParamSpec, Protocol, TypeVar

from selfplay.processes import children
from selfplay.processes.logs import bound_log, keep_bounded, open_log

P = ParamSpec("P")
Made = TypeVar("Made")

ADDRESS = "%ADDRESS%"
"""In the arguments of a child it stands for the address at which others reach what listens where the child runs."""
NODE, PORT = "%NODE%", "%PORT%"
"""In the arguments of a child that runs on several nodes: the number of the node, and a port of the first one. ADDRESS is that of
the first one then."""
LOOPBACK = "127.0.0.1"
OWN = 0o077
"""The umask of whoever runs rounds, and of all children, on nodes too: what is in a run folder is for the owner of the run alone."""

_given: int | None = None  # The umask that this process had before it took OWN.


def take_own_umask() -> None:
    """Have this process make files for their owner alone, and remember what it was started with (`given_umask`)."""
    global _given
    before = os.umask(OWN)
    _given = before if _given is None else _given


def given_umask() -> int:
    """The umask that this process was started with: for what it makes outside of a run folder, such as what others are to read."""
    if _given is not None:
        return _given
    os.umask(now := os.umask(OWN))
    return now


# The kernel sends PR_SET_PDEATHSIG when the THREAD that started a process ends. This thread lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")


class Process(Protocol):
    """A guard and the child below it."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    pid: int
    """The process id of the guard, which is also the id of its process group, where it runs."""
    lost: str
    """Why it ended, where its exit code does not tell; otherwise empty."""

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""

    def send_signal(self, signal: int, /) -> None:
        """Send a signal to the guard, which ends the child: after SIGTERM in its time, after SIGUSR1 at once."""

    def end(self) -> None:
        """Kill the guard and its process group."""

    def close(self) -> None:
        """Close the pipes, once it has ended."""


class Place(Protocol):
    """Where a child is started."""

    def start(self, argv: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
        """Start `argv` with `variables` beside those of the environment there, and return at once."""


class Places(Protocol):
    """Where the children of a run are started, by their role."""

    def of(self, role: str, number: int = 0) -> Place:
        """The place of a child. `role` is engine, reward, judge, trainer or suite-<name>, and `number` tells apart the children of
        a role that live at the same time."""


class Local(subprocess.Popen[bytes]):
    """A process of this machine."""

    lost = ""

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        bound_log(log)
        with open_log(log) as stderr:
            pipe: Any = subprocess.PIPE
            super().__init__(argv, stdin=pipe, stdout=pipe, stderr=stderr, env=env, start_new_session=True, umask=OWN)
        self._closed = threading.Event()
        watch = threading.Thread(target=keep_bounded, args=(log, self._closed), name=f"{log.stem}-log", daemon=True)
        watch.start()

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        self._closed.set()
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                stream.close()


class Here:
    """This machine, for every role."""

    def of(self, role: str, number: int = 0) -> Place:
        return self

    def start(
        self,
        argv: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        address: str = LOOPBACK,
        without: Sequence[str] = (),
    ) -> Local:
        """`without`: variables of the environment here that the child does not get."""
        told = [word.replace(ADDRESS, address) for word in argv]
        guarded = [sys.executable, "-m", "selfplay.processes.guard", str(os.getpid()), "--", *told]
        found = environment(variables)
        for name in set(without) - variables.keys():
            found.pop(name, None)
        return lasting(Local, guarded, log, found)


HERE = Here()


def lasting(work: Callable[P, Made], *args: P.args, **named: P.kwargs) -> Made:
    """Do `work` on the thread that lives as long as the process, since what it starts may end with its thread."""
    return _spawner.submit(work, *args, **named).result()


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child of this process, with some variables added."""
    own = variables.get(children.OWN, "").split(",")
    found = {**children.inherited_environment(*own), **variables}
    found.pop(children.OWN, None)
    # Without bytecode files the imports of a child take two to three times as long, at every start.
    found.pop("PYTHONDONTWRITEBYTECODE", None)
    # The service may be started in any folder, and its children have to find the package by its name.
    root = str(Path(__file__).resolve().parents[2])
    found["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return found
