"""Waiting for pipes and sockets with poll. It takes descriptors of any number, and select takes none above 1023."""

import select
from collections.abc import Mapping
from math import ceil
from typing import Protocol, TypeVar

READ, WRITE = select.POLLIN, select.POLLOUT
LONGEST = 2**31 - 1  # milliseconds that poll can wait


class Stream(Protocol):
    def fileno(self) -> int: ...


S = TypeVar("S", bound=Stream)


def wait(events: Mapping[S, int], seconds: float) -> dict[S, int]:
    """The streams on which an event (READ, WRITE) or a fault has come, with what came; none when the seconds have passed.

    A stream whose other side has closed it is among them, whatever was asked for: reading or writing it shows what happened.
    """
    poll = select.poll()
    for stream, wanted in events.items():
        poll.register(stream.fileno(), wanted)
    found = dict(poll.poll(ceil(min(max(seconds, 0.0) * 1000, LONGEST))))
    return {stream: found[stream.fileno()] for stream in events if stream.fileno() in found}
