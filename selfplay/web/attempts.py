"""How often an address may try a token, at the log-in and in the header of a request."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from reward.serving.connections import address_of

MOST = 5  # wrong tokens of one address within so many seconds; then it has to wait
SECONDS = 60.0
ADDRESSES = 4096  # that are remembered, the last ones


class Attempts:
    """Wrong tokens, by the address (of IPv6, by the network) that they came from. Only the event loop may use it."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def wait(self, host: str) -> int:
        """Seconds until an address may try again; 0 where it may now."""
        recent = self._recent(address_of(host))
        return math.ceil(recent[-MOST] + SECONDS - time.monotonic()) if len(recent) >= MOST else 0

    def wrong(self, host: str) -> None:
        address = address_of(host)
        self._wrong[address] = [*self._recent(address), time.monotonic()]
        self._wrong.move_to_end(address)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)

    def _recent(self, address: str) -> list[float]:
        since = time.monotonic() - SECONDS
        return [when for when in self._wrong.get(address, ()) if when > since]
