"""From items to requests: they are checked, written as JSON and put together while earlier requests are on their way.

What is in memory at any time is the request that is being made and a few items behind it, however many items there are.
"""

import itertools
import secrets
import threading
from collections.abc import Container, Iterator, Mapping, Sequence

from pydantic import TypeAdapter

from reward.dialects import Dialect, Entry, Scored
from reward.schema import Item, Message, Messages

Conversation = Sequence[Mapping[str, str]]

SLICE = 64  # items that are written as JSON at once
MESSAGES = TypeAdapter(Messages)


def check(items: Sequence[tuple[Conversation, str]], references: Sequence[str | None]) -> None:
    """Raise ValueError, which names the place, for an item that is no conversation with a response."""
    last: Conversation | None = None
    for place, ((messages, response), reference) in enumerate(zip(items, references, strict=True)):
        try:
            if last is None or not _is_same(messages, last):
                _messages(messages)
                last = messages
            if not isinstance(response, str) or not isinstance(reference, str | None):
                raise TypeError("the response and the reference must be texts")
        except (TypeError, ValueError) as error:
            raise ValueError(f"item {place} is no conversation with a response: {error}") from error


class Requests:
    """The requests for items that `check` has passed. Several threads may take them.

    Answers to the same prompt stay together where they fit into `batch_size` items and `batch_bytes` bytes, because a
    judge compares them. Items at places in `known` are left out of requests that are otherwise what they would be: the
    last bits of a score may depend on what else is in its request.
    `tokenizer`: held while a dialect reads items, because its tokenizer serves one thread at a time.
    """

    def __init__(
        self,
        items: Sequence[tuple[Conversation, str]],
        references: Sequence[str | None],
        known: Container[int],
        *,
        dialect: Dialect,
        tokenizer: threading.Lock,
        batch_size: int,
        batch_bytes: int,
    ) -> None:
        self.bad: list[Scored] = []
        """Items that no request can hold, of those that were looked at so far."""
        self._items, self._references, self._known = items, references, known
        self._dialect, self._tokenizer = dialect, tokenizer
        self._batch_size, self._batch_bytes = batch_size, batch_bytes
        self._lock = threading.Lock()
        self._chunks = self._all_chunks()

    def take(self) -> list[Entry] | None:
        """The items of the next request; None when there is no more."""
        with self._lock:
            return next(self._chunks, None)

    def _all_chunks(self) -> Iterator[list[Entry]]:
        chunk: list[Entry] = []
        size = 0
        for part in self._parts():
            more = sum(entry.size for entry in part)
            if chunk and (len(chunk) + len(part) > self._batch_size or size + more > self._batch_bytes):
                yield from self._wanted(chunk)
                chunk, size = [], 0
            chunk += part
            size += more
        yield from self._wanted(chunk)

    def _wanted(self, chunk: list[Entry]) -> Iterator[list[Entry]]:
        if wanted := [entry for entry in chunk if entry.place not in self._known]:
            yield wanted

    def _parts(self) -> Iterator[list[Entry]]:
        """What stays together: all answers to a prompt where one request can hold them, otherwise each answer alone."""
        for _, group in itertools.groupby(self._entries(), key=lambda entry: entry.group):
            together = list(itertools.islice(group, self._batch_size + 1))
            if len(together) <= self._batch_size and sum(entry.size for entry in together) <= self._batch_bytes:
                yield together
            else:
                yield from ([entry] for entry in itertools.chain(together, group))

    def _entries(self) -> Iterator[Entry]:
        """The items as JSON, slice by slice. Those that cannot be written go to `bad`."""
        call = secrets.token_hex(4)  # tells the answers to another call apart
        given: Conversation | None = None
        messages: list[Message] = []
        group = 0
        for start in range(0, len(self._items), SLICE):
            items: list[Item] = []
            groups: list[int] = []
            for place in range(start, min(start + SLICE, len(self._items))):
                turns, response = self._items[place]
                if given is None or not _is_same(turns, given):
                    given, earlier, messages = turns, messages, _messages(turns)
                    group = group if messages == earlier else place
                reference = self._references[place]
                item = {"messages": messages, "response": response, "id": f"{call}.{place}", "reference": reference}
                items.append(Item.model_validate(item))
                groups.append(group)
            with self._tokenizer:
                parts_of_all = self._dialect.parts(items)
            for place, parts, same in zip(itertools.count(start), parts_of_all, groups, strict=False):
                if not isinstance(parts, str):
                    yield Entry(place=place, id=f"{call}.{place}", parts=parts, group=same)
                elif place not in self._known:
                    self.bad.append(Scored(place=place, score=None, reason=parts))


def _is_same(a: Conversation, b: Conversation) -> bool:
    return a is b or a == b


def _messages(turns: Conversation) -> list[Message]:
    """Raises ValueError (pydantic's, too) and TypeError for what are no messages."""
    return MESSAGES.validate_python([dict(turn) for turn in turns])
