"""How an engine's child takes its orders, and how what goes wrong is told to the controller."""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from selfplay.errors import CheckpointError, DiskError, InputError
from selfplay.processes.protocol import Channel, Event
from selfplay.storage import seen


class OrderError(Exception):
    """An order that cannot be carried out. `kind` goes over the wire: input, shape, oom, disk or internal."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind, self.hint = kind, hint


class Work(Protocol):
    """Orders that are answered later, while others are taken."""

    @property
    def busy(self) -> bool: ...

    def step(self) -> None:
        """Go on for a moment."""

    def fail(self, error: Exception) -> None:
        """Answer each of them by an error."""


class _Later:
    """An order that returns this is answered by the `Work` that it was given to."""


LATER = _Later()


def take_orders(
    channel: Channel,
    known: Mapping[str, Callable[[Event], Any]],
    fatal: type[BaseException] | tuple[type[BaseException], ...] = (),
    work: Work | None = None,
) -> None:
    """Say «ready», then answer each order by what `known` returns for it, until there are no more.

    The files that an order names with their hashes are checked before, as this node sees them. An order that fails is
    answered by its error, and the next one is taken. A `fatal` error ends the process. While `work` is
    busy it goes on step by step, and orders are taken between two steps.
    """
    channel.ready()
    orders = channel.incoming()
    while True:
        working = work is not None and work.busy
        try:
            order = orders.get(block=not working)
        except queue.Empty:
            assert work is not None
            try:
                work.step()
            except fatal:
                raise
            except Exception as error:
                traceback.print_exc()
                work.fail(error)
            continue
        if order is None:
            return
        try:
            seen.require(order)
            result = known[order["order"]](order)
            if result is not LATER:
                channel.result(order, result)
        except fatal:
            raise
        except Exception as error:
            traceback.print_exc()
            wire = describe(error, order["order"])
            channel.error(order, wire.kind, str(wire), wire.hint)


def describe(error: Exception, order: str) -> OrderError:
    """An exception of ours, of torch or of vLLM as an error that goes over the wire."""
    if isinstance(error, OrderError):
        return error
    if isinstance(error, InputError | DiskError):
        return OrderError("disk" if isinstance(error, DiskError) else "input", str(error), error.hint)
    if isinstance(error, CheckpointError):  # another try, or another node, may see what was written
        return OrderError("internal", str(error), error.hint)
    text = f"{type(error).__name__}: {error}"
    small = text.lower()
    if isinstance(error, MemoryError) or any(
        sign in small
        for sign in ("out of memory", "outofmemory", "can't allocate memory", "less than requested memory")
    ):
        return OrderError(
            "oom", text, "lower generate.engine.gpu_memory_utilization or max_num_seqs; on a CPU, cpu_kv_cache_gib"
        )
    if order == "reload" and ("size" in small or "shape" in small):
        return OrderError("shape", text)
    if order == "load" and isinstance(error, ValueError):
        return OrderError("input", text)
    return OrderError("internal", text)
