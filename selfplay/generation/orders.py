"""How an engine's child takes its orders, and how what goes wrong is told to the controller."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from selfplay.errors import DiskError, InputError
from selfplay.processes.protocol import Channel, Event


class OrderError(Exception):
    """An order that cannot be carried out. `kind` goes over the wire: input, shape, oom, disk or internal."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind, self.hint = kind, hint


def take_orders(
    channel: Channel,
    known: Mapping[str, Callable[[Event], Any]],
    fatal: type[BaseException] | tuple[type[BaseException], ...] = (),
) -> None:
    """Say «ready», then answer each order by what `known` returns for it, until there are no more.

    An order that fails is answered by its error, and the next one is taken. A `fatal` error ends the process.
    """
    channel.ready()
    for order in channel.orders():
        try:
            channel.result(order, known[order["order"]](order))
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
