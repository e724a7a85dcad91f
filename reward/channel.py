"""Requests to one service that has one address or several. Connections are kept, and each address has a breaker.

There is one retry policy. What may succeed at another attempt is tried again until the deadline, and then raised as
RewardUnavailable. What another attempt cannot mend is raised at once.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import tenacity

from reward.addresses import InvalidAddress, address
from reward.endpoints import Endpoint, Endpoints
from reward.faults import Fault, HttpError, LateAnswer, RewardRefused, RewardUnavailable, TooLarge
from reward.http import Answer, Http, bearer

T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
ANSWER = 2**20  # bytes of an answer that has no bound of its own
PATIENCE = 10.0  # seconds for an address that others can stand in for


class Channel:
    """Several threads may use one channel. `what` names the service in messages, and `advice` says what to do when it is
    down.

    `timeout` is the seconds of one attempt, and `deadline` those of all attempts. `first_wait` and `longest_wait` are the
    seconds between two attempts. The wait doubles each time, and up to `first_wait` is added at random. `connections` are
    kept open. `proxy` is the address of an HTTP proxy on the way. `too_large` are the HTTP statuses that raise TooLarge.
    Raises ValueError for what is no address, and for a key that no header can hold.
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
        proxy: str | None = None,
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
        self._key = api_key
        self._http = Http(connections, {"authorization": bearer(api_key)} if api_key else None, proxy)

    def move(self, url: str) -> None:
        """Ask at another address from now on, instead of the only one so far."""
        self.urls = [url.rstrip("/")]
        self._endpoints.move(self.urls[0])

    def close(self) -> None:
        self._http.close()

    def ask(
        self, path: str, body: bytes, read: Callable[[Answer], T], stop: threading.Event, *, limit: int = ANSWER
    ) -> T:
        """What `read` makes of the answer of any address to `POST path`. `read` raises Fault for an answer of no use, and
        sets `named` where the answer names its request. `limit`: the most bytes of an answer.

        Raises RewardUnavailable, RewardRefused and TooLarge.
        """
        return self._retry(
            self._endpoints.all, lambda url, t: self._exchange("POST", url + path, t, body, limit, read), stop
        )

    def ask_each(self, path: str, read: Callable[[bytes, str], T], absent: T, stop: threading.Event) -> dict[str, T]:
        """What `read(content, url)` makes of what each address answers to `GET path`, by address, if it answers now; as in
        `ask` while none does. `absent` stands for a 404."""
        found: dict[str, T] = {}

        def attempt(url: str, seconds: float) -> T:
            try:
                found[url] = self._exchange(
                    "GET", url + path, seconds, None, ANSWER, lambda answer: read(answer.content, url), fresh=True
                )
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

    def _exchange(
        self,
        method: str,
        url: str,
        seconds: float,
        body: bytes | None,
        limit: int,
        read: Callable[[Answer], T],
        fresh: bool = False,
    ) -> T:
        """What `read` makes of a 200. Raises Fault, TooLarge or RewardRefused."""
        until = time.monotonic() + seconds
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            with self._http.ask(
                method, url, seconds=seconds, limit=limit, body=body, headers=headers, fresh=fresh
            ) as answer:
                if answer.status == 200:
                    return read(answer)
        except LateAnswer as error:
            raise Fault(f"no whole answer within {seconds:.1f} s") from error
        except HttpError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        said = f"HTTP {answer.status}: {answer.said(self._key)}"
        if answer.status in RETRIED:
            wish = _seconds(answer.headers.get("retry-after", ""))
            raise Fault(said, wish, busy=answer.status == 429)
        if answer.reused:  # no item is set aside, and no scoring ends, for what an earlier request was told
            return self._exchange(method, url, until - time.monotonic(), body, limit, read, fresh=True)
        if body is not None and answer.status in self._too_large:
            raise TooLarge(said)
        message = f"{url} refuses the request, {said}. Is this a {self._what}, of the same version?"
        raise RewardRefused(message, answer.status)


def _is_address(url: str) -> bool:
    try:
        address(url)
    except InvalidAddress:
        return False
    return True


def _seconds(retry_after: str) -> float:
    """Retry-After in seconds. A date or nonsense counts as no wish."""
    return min(float(retry_after), 60.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
