"""The client of a reward service: `RewardClient(url).score([(messages, response), …])`.

A result is a finite number, or None where an item is bad (no finite score, too long, not valid text). Whatever is wrong
with the server rather than an item is retried by one policy and then raised: an outage is never a score.
"""

import itertools
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import httpx
import tenacity
from pydantic import ValidationError

from reward.dialects import Entry, Name, Scored
from reward.dialects import dialect as _dialect
from reward.endpoints import Endpoint, Endpoints
from reward.faults import Fault, RewardRefused, RewardUnavailable, TooLarge
from reward.schema import Health, Item

__all__ = ["RewardClient", "RewardRefused", "RewardUnavailable"]

log = logging.getLogger(__name__)
T = TypeVar("T")

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
MAX_ANSWER = 64 * 2**20  # bytes; a score is about 20
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")


class RewardClient:
    """Scores conversations. May be used by several threads; ends with `close()` or `with`.

    `url`          base address of a reward service, or of several with the same model: the least busy one is asked, and
                   one that fails again and again rests (reward/endpoints.py)
    `dialect`      what the service speaks (reward/dialects.py); `tokenizer`: folder of the reward model's tokenizer, for
                   the dialects that send rendered text; `model`: its name there, where a service has several
    `api_key`      sent as a bearer token
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
        dialect: Name = "selfplay",
        tokenizer: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
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
        self._dialect = _dialect(dialect, tokenizer=tokenizer, model=model)
        self._tokenizer = threading.Lock()  # a tokenizer serves one thread at a time
        self._endpoints = Endpoints(self.urls, first_rest=first_wait, longest_rest=longest_wait)
        self._jitter = tenacity.wait_exponential_jitter(multiplier=first_wait, max=longest_wait, jitter=first_wait)
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            # a proxy from the environment is for the world, not for a server on this machine
            mounts=dict.fromkeys(LOOPBACK),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=concurrency, keepalive_expiry=30.0),
        )

    def score(
        self,
        items: Sequence[tuple[Sequence[Mapping[str, str]], str]],
        on_progress: Callable[[int], None] | None = None,
        *,
        references: Sequence[str | None] | None = None,
    ) -> list[float | None]:
        """One finite score for each (messages, response), in order, or None where that item is bad.

        `references`: an answer that is known to be right for each item, for rules and judges that compare with one.
        `on_progress` is called in this thread with the number of items done so far.
        Raises RewardUnavailable (an outage), RewardRefused (what was asked, or what answers, is wrong), and ValueError
        for items that are no conversations.
        """
        entries, bad = self._entries(items, references or [None] * len(items))
        chunks = self._chunks(entries)
        todo: queue.SimpleQueue[list[Entry]] = queue.SimpleQueue()
        answers: queue.SimpleQueue[list[Scored] | Exception] = queue.SimpleQueue()
        stop = threading.Event()
        for chunk in chunks:
            todo.put(chunk)

        def work() -> None:
            while not stop.is_set():
                try:
                    part = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put(self._ask(part, stop))
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
        found = [self._retry([e], self._health, stop) for e in self._endpoints.all]
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

    def _entries(
        self, items: Sequence[tuple[Sequence[Mapping[str, str]], str]], references: Sequence[str | None]
    ) -> tuple[list[Entry], list[Scored]]:
        """The items as JSON, and those that cannot be written as such."""
        call = secrets.token_hex(4)  # an answer to another call is noticed
        checked: list[Item] = []
        groups: list[int] = []
        for place, ((messages, response), reference) in enumerate(zip(items, references, strict=True)):
            turns = [dict(m) for m in messages]
            item = {"messages": turns, "response": response, "id": f"{call}.{place}", "reference": reference}
            try:
                checked.append(Item.model_validate(item))
            except ValidationError as error:
                raise ValueError(f"item {place} is no conversation with a response: {error}") from error
            same = place > 0 and checked[-1].messages == checked[-2].messages
            groups.append(groups[-1] if same else place)
        entries: list[Entry] = []
        bad: list[Scored] = []
        with self._tokenizer:
            parts_of_all = self._dialect.parts(checked)
        for place, parts in enumerate(parts_of_all):
            if isinstance(parts, str):
                bad.append(Scored(place=place, score=None, reason=parts))
            else:
                entries.append(Entry(place=place, id=f"{call}.{place}", parts=parts, group=groups[place]))
        return entries, bad

    def _chunks(self, entries: list[Entry]) -> list[list[Entry]]:
        """Requests within the limits. Answers to the same prompt stay together where they fit: a judge compares them."""
        chunks: list[list[Entry]] = []
        for group in _groups(entries):
            whole = len(group) <= self._batch_size and sum(e.size for e in group) <= self._batch_bytes
            for part in [group] if whole else [[entry] for entry in group]:
                last = chunks[-1] if chunks else []
                size = sum(e.size for e in last) + sum(e.size for e in part)
                if not chunks or len(last) + len(part) > self._batch_size or size > self._batch_bytes:
                    chunks.append([])
                chunks[-1] += part
        return chunks

    def _ask(self, chunk: list[Entry], stop: threading.Event) -> list[Scored]:
        """The scores of one chunk."""
        body = self._dialect.request(chunk)
        try:
            return self._retry(self._endpoints.all, lambda u, t: self._score(u, t, chunk, body), stop)
        except TooLarge as error:
            if len(chunk) == 1:
                return [Scored(place=chunk[0].place, score=None, reason=str(error))]
            middle = len(chunk) // 2
            return self._ask(chunk[:middle], stop) + self._ask(chunk[middle:], stop)

    def _retry(self, among: list[Endpoint], attempt: Callable[[str, float], T], stop: threading.Event) -> T:
        """The one retry policy: `attempt(url, seconds)` until it succeeds or the deadline leaves no time for another."""
        began = time.monotonic()
        tried = 0

        def wait(state: tenacity.RetryCallState) -> float:
            return max(self._jitter(state), self._endpoints.pause(among))

        def once() -> T:
            nonlocal tried
            left = began + self._deadline - time.monotonic()
            stop.wait(min(self._endpoints.pause(among), max(left, 0.0)))
            left = began + self._deadline - time.monotonic()
            tried += 1
            with self._endpoints.use(among) as endpoint:
                try:
                    return attempt(endpoint.url, max(min(self._timeout, left), 0.05))
                except Fault as fault:
                    note = self._endpoints.busy if fault.busy else self._endpoints.failed
                    note(endpoint, fault.retry_after)
                    raise

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
                f"no usable answer from the reward server at {', '.join(e.url for e in among)}: {tried} attempts in "
                f"{time.monotonic() - began:.1f} s, the last one: {fault}. Look at its log, start it again "
                "(python -m reward.server --model …) or correct its address, then run the same command again."
            ) from fault

    def _score(self, url: str, seconds: float, chunk: list[Entry], body: bytes) -> list[Scored]:
        content = self._exchange("POST", f"{url}{self._dialect.path}", seconds, body)
        return self._dialect.read(content, chunk)

    def _health(self, url: str, seconds: float) -> Health:
        path = self._dialect.health_path
        content = self._exchange("GET", f"{url}{path}", seconds, None) if path else b""
        return self._dialect.health(content, url)

    def _exchange(self, method: str, address: str, seconds: float, body: bytes | None) -> bytes:
        """The body of a 200. Raises Fault, TooLarge or RewardRefused."""
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
                        raise Fault(f"no whole answer within {seconds:.1f} s")
                    if len(content) > MAX_ANSWER:
                        raise Fault(f"an answer of more than {MAX_ANSWER} bytes")
        except httpx.RequestError as error:
            raise Fault(f"{type(error).__name__}: {error}") from error
        if response.status_code == 200:
            return bytes(content)
        said = f"HTTP {response.status_code}: {content[:300].decode('utf-8', 'replace')}"
        if body is not None and response.status_code in self._dialect.too_large:
            raise TooLarge(said)
        if response.status_code in RETRIED:
            wish = _seconds(response.headers.get("retry-after", ""))
            raise Fault(said, wish, busy=response.status_code == 429)
        raise RewardRefused(f"{address} refuses the request, {said}. Is this a reward server, of the same version?")


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host) and (parsed.port or 0) < 2**16


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    return [list(group) for _, group in itertools.groupby(entries, key=lambda e: e.group)]


def _seconds(retry_after: str) -> float:
    """Retry-After as seconds; a date, or nonsense, is no wish."""
    return min(float(retry_after), 60.0) if retry_after.isascii() and retry_after.isdigit() else 0.0
