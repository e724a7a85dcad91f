"""Processes that share the work of an import: copies of the importer."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from selfplay.storage import seals

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """The result of each item in order; with several workers they are processes, copies of this one.

    A fork has all that this process has loaded, a tokenizer as well, without loading it again. What a copy makes again that
    was damaged is told here, as if this process had (`seals.repairs`).
    """
    items = list(items)
    if min(workers, len(items)) < 2:
        yield from map(work, items)
        return
    gc.collect()
    gc.freeze()  # a collection in a copy would touch, and so copy, every page that it shares with this process
    with ProcessPoolExecutor(min(workers, len(items)), get_context("fork")) as processes:
        try:
            for result, repairs in processes.map(partial(_telling, work), items):
                for text in repairs:
                    seals.note_repair(text)
                yield result
        except BaseException:
            processes.shutdown(cancel_futures=True)
            raise
        finally:
            gc.unfreeze()


def _telling(work: Callable[[Item], Result], item: Item) -> tuple[Result, list[str]]:
    seals.repairs()  # those that the process had when it was copied are its own to tell
    return work(item), seals.repairs()


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
