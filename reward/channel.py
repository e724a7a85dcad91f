"""Requests to one service that has one address or several. Connections are kept, and each address has a breaker.

There is one retry policy. What may succeed at another attempt is tried again until the deadline, and then raised as
RewardUnavailable. What another attempt cannot mend is raised at once.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import httpx
import tenacity

from reward.endpoints import Endpoint, Endpoints
from reward.faults import Fault, RewardRefused, RewardUnavailable, TooLarge

T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_ANSWER = 64 * 2**20  # bytes; a score is about 20
PATIENCE = 10.0  # seconds for an address that others can stand in for
_url = functools.lru_cache(httpx.URL)  # httpx takes as long to read an address as to send a short request
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class Channel:
    """Several threads may use one channel. `what` names the service in messages, and `advice` says what to do when it is
    down.

    `timeout` is the seconds of one attempt, and `deadline` those of all attempts. `first_wait` and `longest_wait` are the
    seconds between two attempts. The wait doubles each time, and up to `first_wait` is added at random. `connections` are
    kept open. `too_large` are the HTTP statuses that raise TooLarge.
    Raises ValueError for what is no address.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        what: str,
        advice: str,
        connections: int,
        timeout: float,
        deadline: float,
        first_wait: float,
        longest_wait: float,
        api_key: str | None = None,
        too_large: frozenset[int] = frozenset({413}),
    ) -> None:
        self.urls = [u.rstrip("/") for u in urls]
        if not self.urls:
            raise ValueError(f"at least one address of a {what} is needed")
        for u in self.urls:
            if not _is_address(u):
                raise ValueError(f"the address of a {what} is like http://host:8100, not {u!r}")
        if min(timeout, deadline) <= 0 or min(first_wait, longest_wait) < 0:
            raise ValueError("timeout and deadline must be positive, waits not negative")
        self._what, self._advice, self._too_large = what, advice, too_large
        self._timeout, self._deadline = timeout, deadline
        # Clients that have waited equally long must not all return at once.
        exponential = tenacity.wait_exponential(multiplier=first_wait, max=longest_wait)
        self._jitter = exponential + tenacity.wait_random(0, first_wait)
        self._endpoints = Endpoints(self.urls, first_rest=first_wait, longest_rest=longest_wait)
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            # A proxy of the environment leads to the world outside, and not to a server on this machine.
            mounts=dict.fromkeys(LOOPBACK),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections, keepalive_expiry=30.0),
        )

    def close(self) -> None:
        self._http.close()

    def ask(
        self, method: str, path: str, body: bytes | None, read: Callable[[bytes, str], T], stop: threading.Event
    ) -> T:
        """What `read(content, url)` makes of the answer of any address. `read` raises Fault for an answer of no use.

        Raises RewardUnavailable, RewardRefused and TooLarge.
        """
        return self._retry(self._endpoints.all, lambda u, t: read(self._exchange(method, u + path, t, body), u), stop)

    def ask_each(self, path: str, read: Callable[[bytes, str], T], absent: T, stop: threading.Event) -> dict[str, T]:
        """What each address answers to `GET path`, by address, if it answers now; as in `ask` while none does. `absent` stands
        for a 404."""
        found: dict[str, T] = {}

        def attempt(url: str, seconds: float) -> T:
            try:
                found[url] = read(self._exchange("GET", url + path, seconds, None), url)
            except RewardRefused as refused:
                if refused.status != 404:
                    raise
                found[url] = absent
            return found[url]

        for endpoint in self._endpoints.all:
            if self._endpoints.pause([endpoint]) == 0:
                until = time.monotonic() + min(self._timeout, PATIENCE)
                with contextlib.suppress(Fault):  # the others do its work as long as there are any
                    self._once([endpoint], attempt, until, stop, closes=False)
        if not found:
            self._retry(self._endpoints.all, attempt, stop, closes=False)
        return found

    def _once(
        self,
        among: list[Endpoint],
        attempt: Callable[[str, float], T],
        until: float,
        stop: threading.Event,
        closes: bool,
    ) -> T:
        """One attempt at the best of these addresses. Raises Fault, which is counted. `closes` says whether a success closes
        the breaker."""
        with self._endpoints.use(among, until=until, stop=stop, closes=closes) as endpoint:
            began = time.monotonic()
            try:
                return attempt(endpoint.url, max(min(self._timeout, until - began), 0.05))
            except Fault as fault:
                if fault.busy:
                    self._endpoints.busy(endpoint, fault.retry_after)
                else:
                    self._endpoints.failed(endpoint, fault.retry_after, began)
                raise

    def _retry(
        self, among: list[Endpoint], attempt: Callable[[str, float], T], stop: threading.Event, closes: bool = True
    ) -> T:
        """The one retry policy: `attempt(url, seconds)` is repeated until it succeeds or no time is left."""
        began = time.monotonic()
        tried = 0

        def wait(state: tenacity.RetryCallState) -> float:
            return max(self._jitter(state), self._endpoints.pause(among))

        def once() -> T:
            nonlocal tried
            until = began + self._deadline
            stop.wait(min(self._endpoints.pause(among), max(until - time.monotonic(), 0.0)))
            tried += 1
            return self._once(among, attempt, until, stop, closes)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Fault),
            wait=wait,
            stop=tenacity.stop_before_delay(self._deadline) | tenacity.stop_when_event_set(stop),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(once)
        except Fault as fault:
            raise RewardUnavailable(
                f"no usable answer from the {self._what} at {', '.join(e.url for e in among)}: {tried} attempts in "
                f"{time.monotonic() - began:.1f} s, the last one: {str(fault).rstrip('.')}. {self._advice}"
            ) from fault

    def _exchange(self, method: str, address: str, seconds: float, body: bytes | None) -> bytes:
        """The body of a 200. Raises Fault, TooLarge or RewardRefused."""
        end = time.monotonic() + seconds
        timeout = httpx.Timeout(seconds, connect=min(seconds, 10.0))
        headers = {"content-type": "application/json"} if body is not None else {}
        content = bytearray()
        try:
            with self._http.stream(method, _url(address), content=body, headers=headers, timeout=timeout) as response:
                for part in response.iter_bytes():
                    content += part
                    # httpx bounds the wait for each part, and not the wait for all of them
                    if time.monotonic() > end:
                        raise Fault(f"no whole answer within {seconds:.1f} s")
                    if len(content) > MAX_ANSWER:
                        raise Fault(f"an answer of more than {MAX_ANSWER} bytes")
        except httpx.RequestError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return bytes(content)
        said = f"HTTP {response.status_code}: {content[:300].decode('utf-8', 'replace')}"
        if body is not None and response.status_code in self._too_large:
            raise TooLarge(said)
        if response.status_code in RETRIED:
            wish = _seconds(response.headers.get("retry-after", ""))
            raise Fault(said, wish, busy=response.status_code == 429)
        message = f"{address} refuses the request, {said}. Is this a {self._what}, of the same version?"
        raise RewardRefused(message, response.status_code)


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 2**16


def _seconds(retry_after: str) -> float:
    """Retry-After in seconds. A date or nonsense counts as no wish."""
    return min(float(retry_after), 60.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
