"""Time and threads of the service in a history: nothing waits, and what another thread would do is done at its virtual time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from simulation.world import POLL, World


class Clock:
    """Stands for the module `time`, and for `datetime.now`."""

    world: World

    def __init__(self) -> None:
        self.thread: int | None = None
        """That of the history. Before the first one there is nothing to stand for."""
        self._said: tuple[Any, str] = None, ""
        """The last time that was asked for, and its text: it is asked for more often than it changes."""

    def begin(self, world: World) -> None:
        """A history begins, in the thread that calls this."""
        self.world, self.thread = world, threading.get_ident()

    def monotonic(self) -> float:
        return self.world.monotonic

    def now(self) -> str:
        """As `ledger.now`."""
        now = self.world.now
        if self._said[0] is not now:
            self._said = now, now.isoformat(timespec="milliseconds")
        return self._said[1]


CLOCK = Clock()


class Event:
    """As `threading.Event`. Whoever waits for it waits for nothing else: that is when the service is idle."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float | None = None) -> bool:
        if not self._set:
            world = CLOCK.world
            world.moment("idle", "the service waits")
            world.on_idle()
            world.sleep(POLL)
        return self._set


class Timer:
    """As `threading.Timer`."""

    daemon = True

    def __init__(self, seconds: float, what: Callable[[], None]) -> None:
        self._seconds, self._what = seconds, what
        self.cancel: Callable[[], None] = lambda: None

    def start(self) -> None:
        self.cancel = CLOCK.world.later(self._seconds, self._what)


class Thread:
    """As `threading.Thread`, of one that tells something and ends. The watch over stalls looks when a child hangs."""

    def __init__(
        self, target: Callable[..., Any], args: tuple[Any, ...] = (), name: str = "", daemon: bool = True
    ) -> None:
        self._run = None if name == "stalls" else lambda: target(*args)

    def start(self) -> None:
        if self._run is not None:
            self._run()

    def join(self, seconds: float) -> None:
        pass


THREADING = SimpleNamespace(Event=Event, Timer=Timer, Thread=Thread)
