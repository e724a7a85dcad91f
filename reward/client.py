"""The client of a reward service: `RewardClient(url).score([(messages, response), …])`.

A result is a finite number, or None for a bad item: one that is too long, is no valid text, or has no finite score. What is
wrong with the server instead of an item is tried again and then raised. An outage is never a score.
"""

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from datetime import date
from types import TracebackType
from typing import Any, Self

from reward.channel import Channel
from reward.dialects import Entry, Name, Scored
from reward.dialects import dialect as _dialect
from reward.faults import RewardRefused, RewardUnavailable, TooLarge
from reward.http import Answer
from reward.requests import Requests, check
from reward.schema import Health

__all__ = ["RewardClient", "RewardRefused", "RewardUnavailable"]

log = logging.getLogger(__name__)

# Bytes of an answer. A score and its id take some 50, and a long reason 1,000. JSON grows by 20 where it is decoded.
ANSWER_HEAD, ANSWER_ITEM = 2**16, 2**12
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
    """Scores conversations. Several threads may use one client. It ends with `close()` or with its `with` block.

    `url`          is the base address of a reward service, or of several with the same model. The least busy one is
                   asked, and one that fails again and again rests (reward/endpoints.py).
    `dialect`      is what the service speaks (reward/dialects.py).
    `tokenizer`    is the folder of the reward model's tokenizer, for the dialects that send rendered text.
    `model`        is the model's name at a service that has several.
    `chat_template_kwargs` are given to the chat template of `tokenizer`, and `template_date` is the date that it prints.
    `api_key`      is sent as a bearer token.
    `proxy`        is the address of an HTTP proxy on the way. The environment's is not used.
    `batch_size`   is the most items in a request, and `batch_bytes` the most bytes.
    `concurrency`  is the most requests in flight for one call of `score`.
    `timeout`      is the most seconds that one request may take.
    `deadline`     is the most seconds that a request may take with all its repetitions. After that it is an outage.
    `first_wait`, `longest_wait` are the seconds before a repetition. The wait doubles each time, and up to `first_wait` is
                   added at random.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        dialect: Name = "selfplay",
        tokenizer: str | None = None,
        model: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        template_date: date | None = None,
        api_key: str | None = None,
        proxy: str | None = None,
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
        self._dialect = _dialect(
            dialect, tokenizer=tokenizer, model=model, variables=chat_template_kwargs, today=template_date
        )
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
            proxy=proxy,
            too_large=self._dialect.too_large,
        )
        self.urls = self._channel.urls
        self.reasons: Counter[str] = Counter()
        """Why the items of the last call got None."""
        self.weights: frozenset[str] = frozenset()
        """What scored the items of the last call (`weights_sha256`), where the service says so with its scores."""
        self._batch_size, self._batch_bytes, self._concurrency = batch_size, batch_bytes, concurrency
        self._waiting: set[queue.SimpleQueue[list[Scored] | Exception | None]] = set()

    def score(
        self,
        items: Sequence[tuple[Sequence[Mapping[str, str]], str]],
        on_progress: Callable[[int], None] | None = None,
        *,
        references: Sequence[str | None] | None = None,
        on_scored: Callable[[Sequence[Scored]], None] | None = None,
        known: Container[int] = (),
    ) -> list[float | None]:
        """One finite score for each (messages, response), in order, or None for a bad item.

        `references` are answers that are known to be right, for rules and judges that compare with one.
        `known` are the places of items whose scores the caller has. They get None, and no request holds them. The requests
        are otherwise what they would be, because the last bits of a score depend on what else is in its request.
        `on_scored` is called in this thread with the answer to each request, then `on_progress` with the number of items
        that are done so far. Requests are made while others are under way, so memory does not grow with the items.
        Raises RewardUnavailable for an outage, RewardRefused when what was asked or what answers is wrong, and ValueError
        for items that are no conversations.
        """
        references = references or [None] * len(items)
        check(items, references)
        self.weights, self.reasons = frozenset(), Counter()
        scores: list[float | None] = [None] * len(items)
        wanted = sum(place not in known for place in range(len(items)))
        if not wanted:
            return scores
        requests = Requests(
            items,
            references,
            known,
            dialect=self._dialect,
            tokenizer=self._tokenizer,
            batch_size=self._batch_size,
            batch_bytes=self._batch_bytes,
        )
        weights: set[str] = set()
        reasons: Counter[str] = Counter()
        done = 0
        with contextlib.closing(self._answers(requests, min(self._concurrency, wanted))) as answers:
            for answer in answers:
                for scored in answer:
                    scores[scored.place] = scored.score
                    if scored.weights:
                        weights.add(scored.weights)
                    if scored.reason:
                        reasons[scored.reason] += 1
                done += len(answer)
                if on_scored:
                    on_scored(answer)
                if on_progress:
                    on_progress(done + len(requests.bad))
        reasons.update(bad.reason for bad in requests.bad if bad.reason)
        self.weights, self.reasons = frozenset(weights), reasons
        if len(weights) > 1:
            raise RewardRefused(
                f"these scores come from {len(weights)} different models ({', '.join(sorted(weights))}): serve one model "
                f"at {', '.join(self.urls)} and score again"
            )
        if reasons:
            log.warning("%d of %d items got no score: %s", reasons.total(), len(items), dict(reasons.most_common(5)))
        return scores

    def _answers(self, requests: Requests, at_once: int) -> Generator[list[Scored], None, None]:
        """What the requests are answered with, `at_once` of them at a time, in the order in which they are done."""
        answers: queue.SimpleQueue[list[Scored] | Exception | None] = queue.SimpleQueue()
        stop = threading.Event()

        def work() -> None:
            try:
                while not stop.is_set() and (part := requests.take()) is not None:
                    answers.put(self._ask(part, stop))
                answers.put(None)
            except Exception as error:  # raised again below, in the caller's thread
                answers.put(error)

        try:
            self._waiting.add(answers)
            for _ in range(at_once):
                # daemons: an interrupt or an outage does not wait for requests that nobody wants any more
                threading.Thread(target=work, name="reward-client", daemon=True).start()
            while at_once:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                if answer is None:
                    at_once -= 1
                else:
                    yield answer
        finally:
            self._waiting.discard(answers)
            stop.set()

    def interrupt(self, error: Exception) -> None:
        """Have every call of `score` that waits now raise `error`. Any thread may call it."""
        for answers in list(self._waiting):
            answers.put(error)

    def health(self) -> Health:
        """What serves, as those addresses say that answer now. Raises RewardUnavailable when none answers, and
        RewardRefused when they have different models."""
        stop = threading.Event()
        path = self._dialect.health_path
        if path is None:
            return self._dialect.health(b"", ", ".join(self.urls))
        # An address without that path is a service of somebody's own, which only scores.
        found = self._channel.ask_each(path, self._dialect.health, UNNAMED, stop)
        first = next(iter(found))
        for url, health in found.items():
            if _served(health) != _served(found[first]):
                raise RewardRefused(
                    f"{first} and {url} serve different models: {found[first].model} and {health.model}, "
                    f"{found[first].dtype} and {health.dtype}"
                )
        return found[first]

    def move(self, url: str) -> None:
        """From now on ask at another address, where the only server now is. Requests that wait go there too."""
        self._channel.move(url)
        self.urls = self._channel.urls

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, chunk: list[Entry], stop: threading.Event) -> list[Scored]:
        """The scores of one chunk."""
        body = self._dialect.request(chunk)

        def read(answer: Answer) -> list[Scored]:
            found = self._dialect.read(answer.content, chunk)
            answer.named = all(scored.named for scored in found)
            return found

        try:
            return self._channel.ask(self._dialect.path, body, read, stop, limit=ANSWER_HEAD + ANSWER_ITEM * len(chunk))
        except TooLarge as error:
            if len(chunk) == 1:
                return [Scored(place=chunk[0].place, score=None, reason=str(error))]
            middle = len(chunk) // 2
            return self._ask(chunk[:middle], stop) + self._ask(chunk[middle:], stop)


def _served(health: Health) -> tuple[str, ...]:
    """What a score depends on."""
    return (health.weights_sha256, health.template_sha256, health.dtype)
