"""The addresses that serve one reward: which of them is asked next, and a breaker for each.

An address that failed BREAKS times in a row rests, longer each time. Then one request at a time tries it; the first one
that succeeds closes its breaker. Requests that fail together are one fault: they say no more than one of them. Where every
address rests, the first to be rested is the one to wait for: a breaker spreads load and spares servers that restart, it
never decides that there is an outage.
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
    """In a row."""
    failed_at: float = 0.0
    """The last of them, by time.monotonic()."""
    rests_until: float = 0.0
    """By time.monotonic()."""
    last_used: int = 0

    @property
    def broken(self) -> bool:
        return self.failures >= BREAKS


class Endpoints:
    """The addresses of one reward, for several threads. `first_rest`, `longest_rest` in seconds."""

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
        """The best of these for one request. What leaves the block without `failed` or `busy` was a success.

        While others try those that may be asked it waits, `until` a time by time.monotonic() or a `stop`. `closes`:
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
        """A fault of this address, in a request that `began` then (by time.monotonic()); it asked for `rest` seconds."""
        with self._lock:
            now = time.monotonic()
            if began > endpoint.failed_at:  # else it was on its way already when another one failed
                endpoint.failures += 1
                endpoint.failed_at = now
                if endpoint.broken:
                    doubled = self._first_rest * 2.0 ** min(endpoint.failures - BREAKS, 20)
                    # at random, so that the clients of one server do not return together
                    rest = max(rest, min(doubled, self._longest_rest) * random.uniform(0.75, 1.25))
            endpoint.rests_until = max(endpoint.rests_until, now + rest)

    def busy(self, endpoint: Endpoint, rest: float) -> None:
        """This address is well but wants no more for `rest` seconds."""
        with self._lock:
            endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest)

    def move(self, url: str) -> None:
        """The only address is another one now, and nothing is known against it."""
        with self._lock:
            (endpoint,) = self.all
            if endpoint.url != url:
                endpoint.url, endpoint.failures, endpoint.rests_until = url, 0, 0.0

    def _free(self, among: Sequence[Endpoint]) -> bool:
        """Whether any of these may be asked now: one with an open breaker only while no other request tries it."""
        now = time.monotonic()
        return any(e.rests_until <= now and not (e.broken and e.in_flight) for e in among)

    def _choose(self, among: Sequence[Endpoint]) -> Endpoint:
        now = time.monotonic()
        rested = [e for e in among if e.rests_until <= now]
        # a probe comes first: without one a server that is back would never be used while the others keep up
        probes = [e for e in rested if e.broken and e.in_flight == 0]
        well = [e for e in rested if not e.broken]
        if probes:
            return min(probes, key=lambda e: e.rests_until)
        if well or rested:
            return min(well or rested, key=lambda e: (e.in_flight + e.failures, e.last_used))
        return min(among, key=lambda e: e.rests_until)
