"""The client of a reward service: `RewardClient(url).score([(messages, response), …])`.

A result is a finite number, or None where an item is bad (no finite score, too long, not valid text). Whatever is wrong
with the server rather than an item is retried by one policy and then raised: an outage is never a score.
"""

import itertools
import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from reward.channel import Channel
from reward.dialects import Entry, Name, Scored
from reward.dialects import dialect as _dialect
from reward.faults import RewardRefused, RewardUnavailable, TooLarge
from reward.schema import Health, Item

__all__ = ["RewardClient", "RewardRefused", "RewardUnavailable"]

log = logging.getLogger(__name__)

ADVICE = (
    "Look at its log, start it again (python -m reward.server --model …) or correct its address, then run the same "
    "command again."
)


UNNAMED = Health(
    kind="service",
    model="a model that it does not name",
    parameters=0,
    dtype="unknown",
    device="unknown",
    max_tokens=0,
    weights_sha256="",
    template_sha256="",
    files={},
)


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
        if min(batch_size, batch_bytes, concurrency) < 1:
            raise ValueError("batch_size, batch_bytes and concurrency must be positive")
        self._dialect = _dialect(dialect, tokenizer=tokenizer, model=model)
        self._tokenizer = threading.Lock()  # a tokenizer serves one thread at a time
        self._channel = Channel(
            [url] if isinstance(url, str) else url,
            what="reward server",
            advice=ADVICE,
            connections=concurrency,
            timeout=timeout,
            deadline=deadline,
            first_wait=first_wait,
            longest_wait=longest_wait,
            api_key=api_key,
            too_large=self._dialect.too_large,
        )
        self.urls = self._channel.urls
        self.reasons: Counter[str] = Counter()
        """Why the items of the last call got None."""
        self.weights: frozenset[str] = frozenset()
        """What scored the items of the last call (`weights_sha256`), where the service says so with its scores."""
        self._batch_size, self._batch_bytes, self._concurrency = batch_size, batch_bytes, concurrency

    def score(
        self,
        items: Sequence[tuple[Sequence[Mapping[str, str]], str]],
        on_progress: Callable[[int], None] | None = None,
        *,
        references: Sequence[str | None] | None = None,
        on_scored: Callable[[Sequence[Scored]], None] | None = None,
        known: Container[int] = (),
    ) -> list[float | None]:
        """One finite score for each (messages, response), in order, or None where that item is bad.

        `references`: an answer that is known to be right for each item, for rules and judges that compare with one.
        `known`: places of items whose scores the caller has; they get None and are left out of the requests, each of
        which is otherwise what it would be: a score's last bits depend on what is in its request.
        `on_progress` is called in this thread with the number of items done so far, `on_scored` before it with what a
        request was answered with.
        Raises RewardUnavailable (an outage), RewardRefused (what was asked, or what answers, is wrong), and ValueError
        for items that are no conversations.
        """
        entries, bad = self._entries(items, references or [None] * len(items))
        whole = self._chunks(entries)
        chunks = [chunk for all_of_it in whole if (chunk := [e for e in all_of_it if e.place not in known])]
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

        done = [d for d in bad if d.place not in known]  # and those that follow
        try:
            for _ in range(min(self._concurrency, len(chunks))):
                # daemons: an interrupt or an outage does not wait for requests that nobody wants any more
                threading.Thread(target=work, name="reward-client", daemon=True).start()
            for _ in chunks:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                done += answer
                if on_scored:
                    on_scored(answer)
                if on_progress:
                    on_progress(len(done))
        finally:
            stop.set()
        self.weights = frozenset(d.weights for d in done if d.weights)
        if len(self.weights) > 1:
            raise RewardRefused(
                f"these scores come from {len(self.weights)} different models ({', '.join(sorted(self.weights))}): serve one model "
                f"at {', '.join(self.urls)} and score again"
            )
        self.reasons = Counter(d.reason for d in done if d.reason)
        if self.reasons:
            log.warning(
                "%d of %d items got no score: %s", self.reasons.total(), len(items), dict(self.reasons.most_common(5))
            )
        scores = {d.place: d.score for d in done}
        return [scores.get(place) for place in range(len(items))]

    def health(self) -> Health:
        """What serves, as the addresses say that answer now. Raises RewardUnavailable where none does, and RewardRefused
        where they have different models."""
        stop = threading.Event()
        path = self._dialect.health_path
        if path is None:
            return self._dialect.health(b"", ", ".join(self.urls))
        # One without the path is a service of somebody's own, which only scores.
        found = self._channel.ask_each(path, self._dialect.health, UNNAMED, stop)
        first = next(iter(found))
        for url, health in found.items():
            if _served(health) != _served(found[first]):
                raise RewardRefused(
                    f"{first} and {url} serve different models: {found[first].model} and {health.model}, "
                    f"{found[first].dtype} and {health.dtype}"
                )
        return found[first]

    def close(self) -> None:
        self._channel.close()

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
            return self._channel.ask(
                "POST", self._dialect.path, body, lambda content, _: self._dialect.read(content, chunk), stop
            )
        except TooLarge as error:
            if len(chunk) == 1:
                return [Scored(place=chunk[0].place, score=None, reason=str(error))]
            middle = len(chunk) // 2
            return self._ask(chunk[:middle], stop) + self._ask(chunk[middle:], stop)


def _served(health: Health) -> tuple[str, ...]:
    """What decides on a score."""
    return (health.weights_sha256, health.template_sha256, health.dtype)


def _groups(entries: list[Entry]) -> list[list[Entry]]:
    return [list(group) for _, group in itertools.groupby(entries, key=lambda e: e.group)]
