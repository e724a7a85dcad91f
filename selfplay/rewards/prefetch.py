"""The next thing is made ready while the one before is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

END = object()


def prefetched(source: Iterator[T]) -> Generator[T, None, None]:
    """What `source` yields. It is asked for the next one, in a thread of its own, while the caller has the one before.

    Close it where it is left before its end: that waits for what `source` is at.
    """
    with ThreadPoolExecutor(1, "prefetch") as beside:
        coming = beside.submit(next, source, END)
        while (found := coming.result()) is not END:
            coming = beside.submit(next, source, END)
            yield found  # type: ignore[misc]
