"""The child's side: JSON lines over stdin and stdout.

An order is `{"id": n, "order": name, …}`. A child answers it with `{"id": n, "result": …}` or with `{"id": n, "error":
{"kind", "message", "hint"}}`, and before that it may send any number of `{"id": n, "event": "progress", …}`. Events that
no order asked for have no id. The most important one is `{"event": "ready"}`: the child can take orders from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from selfplay.processes.guard import GUARDED, PR_SET_PDEATHSIG
from selfplay.processes.installed import packages_distributions

Event = dict[str, Any]


def encode_line(event: Event) -> bytes:
    """One order or event as a line of the protocol. Raises ValueError for NaN and infinite numbers."""
    return json.dumps(event, allow_nan=False).encode() + b"\n"


def parse_line(line: bytes) -> Event | None:
    """The event in a line, or None where the line is no event but something that a program printed."""
    if not line.startswith(b"{"):
        return None
    try:
        event = orjson.loads(line)  # in a long line half the time of `json`
    except ValueError:  # it refuses half of a surrogate pair, which `json` reads and writes
        try:
            event = json.loads(line)
        except ValueError:
            return None
    return event if isinstance(event, dict) else None


class Channel:
    """The child's end of both pipes: orders come in, events and results go out. Any thread may send."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink, self._lock = source, sink, threading.Lock()

    def orders(self) -> Iterator[Event]:
        """Orders, until the controller closes the pipe or sends «exit»."""
        for line in self._source:
            order = json.loads(line)
            if order["order"] == "exit":
                return
            yield order

    def incoming(self) -> queue.SimpleQueue[Event | None]:
        """The same orders in a queue, which a thread fills as they come; None is the end. For a child that looks for orders while
        it works on others."""
        found: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

        def read() -> None:
            for order in self.orders():
                found.put(order)
            found.put(None)

        threading.Thread(target=read, name="orders", daemon=True).start()
        return found

    def send(self, event: Event) -> None:
        """Send one event as it is."""
        with self._lock:
            self._sink.write(encode_line(event))
            self._sink.flush()

    def ready(self, **fields: Any) -> None:
        """Tell the controller that this child can take orders."""
        self.send({"event": "ready", **fields})

    def progress(self, order: Event, **fields: Any) -> None:
        """Tell how far an order has got."""
        self.send({"id": order["id"], "event": "progress", **fields})

    def result(self, order: Event, result: Any) -> None:
        """Answer an order."""
        self.send({"id": order["id"], "result": result})

    def error(self, order: Event, kind: str, message: str, hint: str = "") -> None:
        """Tell that an order failed. The child lives on and takes the next one."""
        self.send({"id": order["id"], "error": {"kind": kind, "message": message, "hint": hint}})


def protocol() -> Channel:
    """The first call of a child, before any heavy import: it dies with its parent, and gets its channel.

    The channel takes over stdin and stdout. Afterwards file descriptor 1 is the log, so nothing that a library prints can
    break a line of the protocol.
    """
    die_with_parent()
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    return Channel(source, sink)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends. This does nothing in a process that no guard started."""
    if GUARDED not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the parent process ended before this one began")


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import transformers in this block without scikit-learn, pandas and scipy, and without garbage collection.

    transformers needs these three only for assisted decoding and for the losses of object detection, and they take
    seconds to import. Imports make no garbage, and looking for it takes a sixth of their time. What was imported stays
    out of later collections too: it is a million objects, and vLLM asks for five whole collections while it loads.
    """
    blocked = {"sklearn", "scipy"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]
    slow, importlib.metadata.packages_distributions = importlib.metadata.packages_distributions, packages_distributions
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        importlib.metadata.packages_distributions = slow
        for name in blocked:
            sys.modules.pop(name, None)  # at the end of the process all may be gone
