"""The client of a reward server: `RewardClient(url).score([(messages, response), …])`.

A result is a finite number, or None where an item is bad (no finite score, too long, not valid text). Whatever is wrong
with the server rather than an item is retried by one policy and then raised: an outage is never a score.
"""

import json
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from types import TracebackType
from typing import Self, TypeVar

import httpx
import tenacity
from pydantic import ValidationError

from reward.schema import Health, Item, ScoreResponse

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_ANSWER = 64 * 2**20  # bytes; a score is about 20
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class RewardUnavailable(Exception):
    """The reward server cannot be used now. Nothing was scored by guess; asking again later is safe."""


class RewardRefused(Exception):
    """The server answers, but not to this: asking again will not help until something is put right."""


class _TooLarge(Exception):
    """The server takes no request of this size."""


class _Fault(Exception):
    """One attempt failed in a way that another may not."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An item on its way: its place in the caller's list, its id and its JSON."""

    place: int
    id: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """What became of one item; `weights` names what scored it, where the server says so."""

    place: int
    score: float | None
    reason: str | None
    weights: str | None


class RewardClient:
    """Scores conversations. May be used by several threads; ends with `close()` or `with`.

    `url`          base address of a reward server, or of several with the same model
    `batch_size`   most items in a request; `batch_bytes` bounds it too
    `concurrency`  most requests in flight for one call of `score`
    `timeout`      seconds that one request may take
    `deadline`     seconds that a request may take with all its repetitions; then it is an outage
    `first_wait`, `longest_wait`  seconds before a repetition: doubled each time, plus up to `first_wait` at random
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        batch_size: int = 128,
        batch_bytes: int = 8 * 2**20,
        concurrency: int = 4,
        timeout: float = 120.0,
        deadline: float = 300.0,
        first_wait: float = 0.5,
        longest_wait: float = 15.0,
    ) -> None:
        self.urls = [u.rstrip("/") for u in ([url] if isinstance(url, str) else url)]
        if not self.urls:
            raise ValueError("at least one address of a reward server is needed")
        for u in self.urls:
            if not _is_address(u):
                raise ValueError(f"the address of a reward server is like http://host:8100, not {u!r}")
        if (
            min(batch_size, batch_bytes, concurrency) < 1
            or min(timeout, deadline) <= 0
            or min(first_wait, longest_wait) < 0
        ):
            raise ValueError(
                "batch_size, batch_bytes, concurrency, timeout and deadline must be positive, waits not negative"
            )
        self.reasons: Counter[str] = Counter()
        """Why the items of the last call got None."""
        self._batch_size, self._batch_bytes, self._concurrency = batch_size, batch_bytes, concurrency
        self._timeout, self._deadline = timeout, deadline
        self._jitter = tenacity.wait_exponential_jitter(multiplier=first_wait, max=longest_wait, jitter=first_wait)
        self._http = httpx.Client(
            # a proxy from the environment is for the world, not for a server on this machine
            mounts=dict.fromkeys(LOOPBACK),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency, keepalive_expiry=30.0),
        )

    def score(
        self,
        items: Sequence[tuple[Sequence[Mapping[str, str]], str]],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[float | None]:
        """One finite score for each (messages, response), in order, or None where that item is bad.

        `on_progress` is called in this thread with the number of items done so far.
        Raises RewardUnavailable (an outage), RewardRefused (what was asked, or what answers, is wrong), and ValueError
        for items that are no conversations.
        """
        entries, bad = self._entries(items)
        chunks = self._chunks(entries)
        todo: queue.SimpleQueue[tuple[int, list[_Entry]]] = queue.SimpleQueue()
        answers: queue.SimpleQueue[list[_Scored] | Exception] = queue.SimpleQueue()
        stop = threading.Event()
        for numbered in enumerate(chunks):
            todo.put(numbered)

        def work() -> None:
            while not stop.is_set():
                try:
                    number, chunk = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put(self._ask(number, chunk, stop))
                except Exception as error:  # raised again below, in the caller's thread
                    answers.put(error)

        done = bad  # and those that follow
        try:
            for _ in range(min(self._concurrency, len(chunks))):
                # daemons: an interrupt or an outage does not wait for requests that nobody wants any more
                threading.Thread(target=work, name="reward-client", daemon=True).start()
            for _ in chunks:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                done += answer
                if on_progress:
                    on_progress(len(done))
        finally:
            stop.set()
        weights = {d.weights for d in done if d.weights}
        if len(weights) > 1:
            raise RewardRefused(
                f"these scores come from {len(weights)} different models ({', '.join(sorted(weights))}): serve one model "
                f"at {', '.join(self.urls)} and score again"
            )
        self.reasons = Counter(d.reason for d in done if d.reason)
        if self.reasons:
            log.warning(
                "%d of %d items got no score: %s", self.reasons.total(), len(items), dict(self.reasons.most_common(5))
            )
        return [d.score for d in sorted(done, key=lambda d: d.place)]

    def health(self) -> Health:
        """What serves. Raises RewardUnavailable, and RewardRefused where several servers have different models."""
        stop = threading.Event()
        found = [self._retry([u], self._health, stop) for u in self.urls]
        for u, health in zip(self.urls, found, strict=True):
            if (health.weights_sha256, health.template_sha256) != (found[0].weights_sha256, found[0].template_sha256):
                raise RewardRefused(
                    f"{self.urls[0]} and {u} serve different models: {found[0].model} and {health.model}"
                )
        return found[0]

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _entries(self, items: Sequence[tuple[Sequence[Mapping[str, str]], str]]) -> tuple[list[_Entry], list[_Scored]]:
        """The items as JSON, and those that cannot be written as such."""
        call = secrets.token_hex(4)  # an answer to another call is noticed
        entries: list[_Entry] = []
        bad: list[_Scored] = []
        for place, (messages, response) in enumerate(items):
            try:
                item = Item.model_validate(
                    {"messages": [dict(m) for m in messages], "response": response, "id": f"{call}.{place}"}
                )
            except ValidationError as error:
                raise ValueError(f"item {place} is no conversation with a response: {error}") from error
            try:
                body = json.dumps(item.model_dump(), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                reason = "text that is not valid Unicode (a lone surrogate)"
                bad.append(_Scored(place=place, score=None, reason=reason, weights=None))
            else:
                entries.append(_Entry(place=place, id=f"{call}.{place}", body=body))
        return entries, bad

    def _chunks(self, entries: list[_Entry]) -> list[list[_Entry]]:
        chunks: list[list[_Entry]] = []
        size = 0
        for entry in entries:
            size += len(entry.body) + 1
            if not chunks or len(chunks[-1]) == self._batch_size or size > self._batch_bytes:
                chunks.append([])
                size = len(entry.body) + 1
            chunks[-1].append(entry)
        return chunks

    def _ask(self, number: int, chunk: list[_Entry], stop: threading.Event) -> list[_Scored]:
        """The scores of one chunk. Chunks begin with different servers, and go on to the next one after each fault."""
        urls = [self.urls[(number + i) % len(self.urls)] for i in range(len(self.urls))]
        body = b'{"items":[' + b",".join(entry.body for entry in chunk) + b"]}"
        try:
            return self._retry(urls, lambda u, t: self._score(u, t, chunk, body), stop)
        except _TooLarge as error:
            if len(chunk) == 1:
                return [_Scored(place=chunk[0].place, score=None, reason=str(error), weights=None)]
            middle = len(chunk) // 2
            return self._ask(number, chunk[:middle], stop) + self._ask(number, chunk[middle:], stop)

    def _retry(self, urls: list[str], attempt: Callable[[str, float], T], stop: threading.Event) -> T:
        """The one retry policy: `attempt(url, seconds)` until it succeeds or the deadline leaves no time for another."""
        began = time.monotonic()

        def wait(state: tenacity.RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            return max(self._jitter(state), fault.retry_after if isinstance(fault, _Fault) else 0.0)

        def once() -> T:
            tried[0] += 1
            left = began + self._deadline - time.monotonic()
            return attempt(urls[(tried[0] - 1) % len(urls)], max(min(self._timeout, left), 0.05))

        tried = [0]
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Fault),
            wait=wait,
            stop=tenacity.stop_before_delay(self._deadline) | tenacity.stop_when_event_set(stop),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            return retrying(once)
        except _Fault as fault:
            raise RewardUnavailable(
                f"no usable answer from the reward server at {', '.join(urls)}: {tried[0]} attempts in "
                f"{time.monotonic() - began:.1f} s, the last one: {fault}. Look at its log, start it again "
                "(python -m reward.server --model …) or correct its address, then run the same command again."
            ) from fault

    def _score(self, url: str, seconds: float, chunk: list[_Entry], body: bytes) -> list[_Scored]:
        content = self._exchange("POST", f"{url}/score", seconds, body)
        try:
            given = ScoreResponse.model_validate_json(content)
        except ValidationError as error:
            raise _Fault(f"an answer of another form: {_first(error)}") from error
        errors = given.errors or [None] * len(chunk)
        if not len(given.scores) == len(errors) == len(chunk):
            raise _Fault(f"{len(given.scores)} scores for {len(chunk)} items")
        # a server that does not return ids is trusted to keep the order, as its format says
        if given.ids is not None and given.ids != [entry.id for entry in chunk]:
            raise _Fault("the scores belong to other items, or are in another order")
        return [
            _Scored(
                place=entry.place,
                score=score if score is not None and isfinite(score) else None,
                reason=None if score is not None and isfinite(score) else (reason or f"the score is {score}")[:200],
                weights=given.weights_sha256,
            )
            for entry, score, reason in zip(chunk, given.scores, errors, strict=True)
        ]

    def _health(self, url: str, seconds: float) -> Health:
        content = self._exchange("GET", f"{url}/healthz", seconds, None)
        try:
            return Health.model_validate_json(content)
        except ValidationError as error:
            raise _Fault(f"an answer of another form: {_first(error)}") from error

    def _exchange(self, method: str, address: str, seconds: float, body: bytes | None) -> bytes:
        """The body of a 200. Raises _Fault, _TooLarge or RewardRefused."""
        end = time.monotonic() + seconds
        timeout = httpx.Timeout(seconds, connect=min(seconds, 10.0))
        headers = {"content-type": "application/json"} if body is not None else {}
        content = bytearray()
        try:
            with self._http.stream(method, address, content=body, headers=headers, timeout=timeout) as response:
                for part in response.iter_bytes():
                    content += part
                    # httpx bounds the wait for each part, not for all of them
                    if time.monotonic() > end:
                        raise _Fault(f"no whole answer within {seconds:.1f} s")
                    if len(content) > MAX_ANSWER:
                        raise _Fault(f"an answer of more than {MAX_ANSWER} bytes")
        except httpx.RequestError as error:
            raise _Fault(f"{type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return bytes(content)
        said = f"HTTP {response.status_code}: {content[:300].decode('utf-8', 'replace')}"
        if response.status_code == 413:
            raise _TooLarge(said)
        if response.status_code in RETRIED:
            raise _Fault(said, _seconds(response.headers.get("retry-after", "")))
        raise RewardRefused(f"{address} refuses the request, {said}. Is this a reward server, of the same version?")


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 2**16


def _first(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, found['loc']))} {found['msg']}".strip()


def _seconds(retry_after: str) -> float:
    """Retry-After as seconds; a date, or nonsense, is no wish."""
    return min(float(retry_after), 60.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
