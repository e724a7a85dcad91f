"""All children of this process together: what they inherit, when one of them was last heard, and how all of them end."""

from __future__ import annotations

import atexit
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from selfplay.errors import Interrupted
from selfplay.processes.guard import LEASE


class Running(Protocol):
    """What this module asks of a child. `selfplay.processes.child.Child` is one."""

    def stop(self, grace: float = ...) -> None: ...

    def cut(self) -> None: ...


OWN = "SELFPLAY_SECRETS"
"""Where a child is started, it stands among its variables: the names, with commas between, of withheld ones that it gets all the
same. Their values are those of the machine where it starts. The child itself does not see it."""

_running: set[Running] = set()
_ending = threading.Event()  # While it is set, no child may start.
_withheld: set[str] = set()
_lease: dict[str, str] = {}  # Environment variables of every child that tell its guard of the lease of the run.
_heard = 0.0  # The time.monotonic() of the last moment at which a child wrote to its output.


def withhold(*variables: str) -> None:
    """Keep environment variables from all children that start later, because they hold secrets that are not theirs."""
    _withheld.update(variables)


def withheld() -> frozenset[str]:
    """The variables that are kept from children."""
    return frozenset(_withheld)


def owning(*variables: str) -> dict[str, str]:
    """For the variables of a child whose own these secrets are."""
    return {OWN: ",".join(sorted(variables))}


def inherited_environment(*own: str) -> dict[str, str]:
    """The environment of this process, for a child: without the variables that are withheld, but with its own.

    In it torch.load makes tensors and plain values and runs no code, whatever a library asks it to do.
    """
    found = {name: value for name, value in os.environ.items() if name in own or name not in _withheld} | _lease
    found.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    return found | {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


def end_with(claim: tuple[Path, float] | None) -> None:
    """Have children that start later end with a claim to the run folder: where its file is gone, is not the newest, or stood
    still for so many seconds."""
    _lease.clear()
    if claim is not None:
        _lease[LEASE] = f"{claim[1]}:{claim[0].absolute()}"


def heard() -> float:
    """When any child last wrote to its output, by time.monotonic()."""
    return _heard


def note_output() -> None:
    """Remember that a child has just written to its output."""
    global _heard
    _heard = time.monotonic()


def check_may_start() -> None:
    """Raises Interrupted after `cut` and before `uncut`."""
    if _ending.is_set():
        raise Interrupted("everything is to end")


def add(child: Running) -> None:
    """Count a child among those that run, so that it ends with the others."""
    _running.add(child)


def discard(child: Running) -> None:
    """Forget a child that has ended."""
    _running.discard(child)


@atexit.register
def stop_all() -> None:
    """End every child of this process."""
    for child in list(_running):
        child.stop(grace=0)


def cut() -> None:
    """End every child, and let none start until `uncut`. Any thread and any signal handler may call it.

    The thread that waits for a child finds it dead and closes its pipes. They are not closed here, because that thread
    may be reading from them.
    """
    _ending.set()
    end_running()


def uncut() -> None:
    """Let children start again."""
    _ending.clear()


def end_running() -> None:
    """End every child at once, as `cut` does, but let others start. Any thread may call it."""
    for child in list(_running):
        child.cut()
