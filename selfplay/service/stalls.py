"""The watch over what hangs: where nothing has got on for too long, it ends the children, and tells people if that is in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from selfplay.config import Config
from selfplay.processes import children

LOOK_SECONDS = 10.0  # between two looks for a stage that hangs
TELL_SECONDS = 10.0  # for terminal and ledger to take that one does: a disk that hangs takes nothing


def longest_quiet(config: Config) -> float:
    """Seconds without a word after which something hangs."""
    return max(config.service.stall_hours * 3600, config.train.silence, config.generate.engine.silence)


class Stalls:
    """Watches that the service gets on: its loop, the stage in it, or a child that says a word.

    limit: seconds without any of these that are a stall; what: what would hang, in words; tell: shows a person a text and
    records an event of a kind; alert: sends a text to the webhook; elsewhere: what may hang where no child does.
    """

    def __init__(
        self, *, limit: Callable[[], float], what: Callable[[], str], tell: Callable[[str, str], None],
        alert: Callable[[str], None], elsewhere: str,
    ) -> None:  # fmt: skip
        self._limit, self._what, self._tell, self._alert, self._elsewhere = limit, what, tell, alert, elsewhere
        self.moved = time.monotonic()  # when the loop, or the stage in it, last got on
        self.count = 0  # stalls since it got on

    def get_on(self) -> None:
        """Called where the loop or a stage gets on."""
        self.moved, self.count = time.monotonic(), 0

    def watch(self, stopping: threading.Event) -> None:
        """Look again and again, until the service stops."""
        while not stopping.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """End all children where nothing has got on for too long: who waits for one finds it dead, and that is tried again.

        Where even that moves nothing it is not a child that hangs, but a disk, a tracker or a function of the user's:
        people are told.
        """
        quiet = time.monotonic() - max(self.moved, children.heard())
        if quiet < self._limit():
            return
        self.moved, self.count = time.monotonic(), self.count + 1
        kind, text = "stalled", f"{self._what()} has not got on for {quiet / 3600:.1f} h (service.stall_hours)"
        if self.count == 1:
            text += ": its processes are ended, and what they did is tried again"
        else:
            kind = "alert"
            text += f", though its processes were ended: {self._elsewhere} hangs; restart the service"
        telling = threading.Thread(target=self._tell, args=(kind, text), daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)
        if kind == "alert":
            self._alert(text)
        children.end_running()
