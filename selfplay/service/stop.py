"""How the service ends: first it gives the shard or the trainer its time, then it cuts all that is waited for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

from selfplay.processes import children

CUT_SECONDS = 10.0  # from the end of all children to the end of a service that waits for something else still


class Stop:
    """A stop that was asked for, or not yet."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.at_last: Callable[[], None] = lambda: None
        """Called where even the cut did not end the service; should end the process."""
        self._cut: threading.Timer | None = None

    def ask(self, drain_seconds: float) -> None:
        """Ask for a stop. Asked again, or after `drain_seconds`, all children are ended."""
        if self.asked.is_set():
            self._cut_short()
            return
        self.asked.set()
        self._later(drain_seconds, self._cut_short)

    def done(self) -> None:
        """The service has ended: nothing is cut any more."""
        if self._cut is not None:
            self._cut.cancel()
        children.uncut()

    def _cut_short(self) -> None:
        children.cut()
        self._later(CUT_SECONDS, lambda: self.at_last())

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        if self._cut is not None:
            self._cut.cancel()
        self._cut = threading.Timer(seconds, what)
        self._cut.daemon = True
        self._cut.start()


def handle_signals(stop: Callable[[], object], reload: Callable[[], object]) -> None:
    """SIGTERM and SIGINT stop the service (`stop`), SIGHUP has it read its configuration anew (`reload`).

    The stop is another thread's: it takes locks, which the thread that is interrupted here may hold.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=stop).start())
    signal.signal(signal.SIGHUP, lambda *_: reload())
