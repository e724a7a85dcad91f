"""The addresses that serve one reward: which of them is asked next, and a breaker for each.

An address that failed BREAKS times in a row rests, and each rest is longer than the one before. After the rest one request
at a time tries it. The first request that succeeds closes the breaker. Several requests that fail together count as one
fault, because they say no more than one of them. If every address rests, the caller waits for the one whose rest ends
first. A breaker spreads the load and spares servers that restart. It never decides that there is an outage.
"""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

BREAKS = 3  # faults in a row


@dataclass(slots=True)
class Endpoint:
    """One address. `Endpoints` alone changes it, under its lock."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """How many faults it had in a row."""
    failed_at: float = 0.0
    """The time of the last fault, by time.monotonic()."""
    rests_until: float = 0.0
    """The end of its rest, by time.monotonic()."""
    last_used: int = 0

    @property
    def broken(self) -> bool:
        return self.failures >= BREAKS


class Endpoints:
    """The addresses of one reward. Several threads may use it. `first_rest` and `longest_rest` are in seconds."""

    def __init__(self, urls: Sequence[str], *, first_rest: float, longest_rest: float) -> None:
        self.all = [Endpoint(url) for url in urls]
        self._first_rest, self._longest_rest = first_rest, longest_rest
        self._lock = threading.Condition()
        self._uses = 0

    def pause(self, among: Sequence[Endpoint]) -> float:
        """Seconds until one of these may be asked."""
        with self._lock:
            return max(0.0, min(e.rests_until for e in among) - time.monotonic())

    @contextmanager
    def use(
        self, among: Sequence[Endpoint], *, until: float = 0.0, stop: threading.Event | None = None, closes: bool = True
    ) -> Iterator[Endpoint]:
        """The best of these addresses for one request. A block that ends without an exception was a success.

        An address with an open breaker may be tried by one request alone. If only such addresses are left, this waits
        until that request is done, until the time `until` (by time.monotonic()), or until `stop` is set. `closes` says
        whether a success closes the breaker.
        """
        with self._lock:
            while not self._free(among) and time.monotonic() < until and not (stop and stop.is_set()):
                self._lock.wait(0.1)
            endpoint = self._choose(among)
            self._uses += 1
            endpoint.last_used = self._uses
            endpoint.in_flight += 1
        try:
            yield endpoint
            if closes:
                with self._lock:
                    endpoint.failures = 0
        finally:
            with self._lock:
                endpoint.in_flight -= 1
                self._lock.notify_all()

    def failed(self, endpoint: Endpoint, rest: float, began: float) -> None:
        """Count a fault of this address. Its request `began` at that time (time.monotonic()). It asked for `rest` seconds."""
        with self._lock:
            now = time.monotonic()
            if began > endpoint.failed_at:  # Otherwise it was under way already when another one failed.
                endpoint.failures += 1
                endpoint.failed_at = now
                if endpoint.broken:
                    doubled = self._first_rest * 2.0 ** min(endpoint.failures - BREAKS, 20)
                    # A random part keeps the clients of one server from returning together.
                    rest = max(rest, min(doubled, self._longest_rest) * random.uniform(0.75, 1.25))
            endpoint.rests_until = max(endpoint.rests_until, now + rest)

    def busy(self, endpoint: Endpoint, rest: float) -> None:
        """This address works, but it wants no further request for `rest` seconds."""
        with self._lock:
            endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest)

    def move(self, url: str) -> None:
        """Replace the only address. The new one has no faults yet."""
        with self._lock:
            (endpoint,) = self.all
            if endpoint.url != url:
                endpoint.url, endpoint.failures, endpoint.rests_until = url, 0, 0.0

    def _free(self, among: Sequence[Endpoint]) -> bool:
        """Whether any of these may be asked now. One with an open breaker may be tried by one request alone."""
        now = time.monotonic()
        return any(e.rests_until <= now and not (e.broken and e.in_flight) for e in among)

    def _choose(self, among: Sequence[Endpoint]) -> Endpoint:
        now = time.monotonic()
        rested = [e for e in among if e.rests_until <= now]
        # A probe comes first. Otherwise a server that is back would not be used as long as the others keep up.
        probes = [e for e in rested if e.broken and e.in_flight == 0]
        well = [e for e in rested if not e.broken]
        if probes:
            return min(probes, key=lambda e: e.rests_until)
        if well or rested:
            return min(well or rested, key=lambda e: (e.in_flight + e.failures, e.last_used))
        return min(among, key=lambda e: e.rests_until)
