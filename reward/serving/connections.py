"""Who may stay connected: a bounded number of connections, and a rule which one goes when another comes.

A connection that waits for its client (for a request, for the rest of a body, for an answer to be taken) can be closed at
any time. One whose request is being answered cannot. So a place for a newcomer is made by closing the one that has said
nothing for longest, and whoever asks at once, such as a health check, is answered before it could be that one.
"""

import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

log = logging.getLogger("reward.serving")

QUICK = 0.25  # seconds; one that is quiet for less goes only where no body is on its way
PER_ADDRESS = 4  # one address has at most this part of all places
SPARE = 8  # and this part is kept from requests that take long
TELL = 60.0  # seconds between two lines in the log

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Phase(Enum):
    """What a connection waits for."""

    HEAD = auto()
    """The request line and the headers."""
    KEPT = auto()
    """The next request, after an earlier one was answered."""
    BODY = auto()
    """The rest of a body."""
    REFUSED = auto()
    """The end of a body that nobody reads, because the answer has been given."""
    LEAVING = auto()
    """The client, which has to take the last answer."""
    BUSY = auto()
    """The app. This is the server's own time."""


class Connection(Protocol):
    def cut(self) -> None:
        """End it at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    connections: int
    """At a time."""
    body_bytes: int
    """Of all bodies together that are on their way."""
    proxies: Sequence[Network] = ()
    """Whose connections are those of many clients. They may have all places, and so may this machine itself."""


class Connections:
    """The connections of one server. Only its event loop may use it."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.closed: Counter[str] = Counter()
        """How many had to go, by reason."""
        self._busy: set[Connection] = set()
        # Both by the time at which the wait began, the longest one first.
        self._quiet: dict[Connection, float] = {}
        self._bodies: dict[Connection, float] = {}
        self._bytes: Counter[Connection] = Counter()
        self._address: dict[Connection, str] = {}
        self._told = 0.0

    def __len__(self) -> int:
        return len(self._busy) + len(self._quiet) + len(self._bodies)

    @property
    def full(self) -> bool:
        """Whether so many requests are being answered that only short ones may join them."""
        return len(self._busy) > self.bounds.connections - max(1, self.bounds.connections // SPARE)

    def enter(self, connection: Connection, host: str) -> bool:
        """Take in a connection from an address, and close another one for it where that is needed. False: it has to go."""
        address = self._counted(host)
        if address:
            same = sum(other == address for other in self._address.values())
            if same >= max(1, self.bounds.connections // PER_ADDRESS) and not self._make_room(
                "too many of one address", address
            ):
                return False
        if len(self) >= self.bounds.connections and not self._make_room("no place left"):
            return False
        self._address[connection] = address
        self._quiet[connection] = time.monotonic()
        return True

    def leave(self, connection: Connection) -> None:
        """It has ended. May be called twice."""
        self._take_out(connection)
        self._address.pop(connection, None)

    def turn(self, connection: Connection, phase: Phase) -> None:
        """It waits for something else now."""
        if connection not in self._address:
            return  # it was cut, and this is what was still under way
        self._take_out(connection)
        if phase is Phase.BUSY:
            self._busy.add(connection)
        elif phase is Phase.BODY:
            self._bodies[connection] = time.monotonic()
        else:
            self._quiet[connection] = time.monotonic()

    def came(self, connection: Connection, size: int) -> None:
        """So many bytes of its body came. Where all bodies together are too large, the slowest is given up. One that is too
        large by itself is left to the app, which has an answer for it."""
        if connection not in self._bodies:
            return
        self._bytes[connection] += size
        while len(self._bodies) > 1 and self._bytes.total() > self.bounds.body_bytes:
            self._cut(next(iter(self._bodies)), "too many bytes of bodies")

    def _take_out(self, connection: Connection) -> None:
        self._busy.discard(connection)
        self._quiet.pop(connection, None)
        self._bodies.pop(connection, None)
        self._bytes.pop(connection, None)

    def _make_room(self, why: str, address: str = "") -> bool:
        """Close the connection (of an address) that can best be missed; False where each is being answered."""
        quiet = self._oldest(self._quiet, address)
        body = self._oldest(self._bodies, address)
        if quiet is not None and (body is None or time.monotonic() - self._quiet[quiet] >= QUICK):
            self._cut(quiet, why)
        elif body is not None:
            self._cut(body, why)
        else:
            self._tell("turned away: " + why)
            return False
        return True

    def _oldest(self, waiting: dict[Connection, float], address: str) -> Connection | None:
        return next((each for each in waiting if not address or self._address[each] == address), None)

    def _cut(self, connection: Connection, why: str) -> None:
        self.leave(connection)
        connection.cut()
        self._tell(why)

    def _tell(self, why: str) -> None:
        self.closed[why] += 1
        if time.monotonic() - self._told > TELL:
            self._told = time.monotonic()
            log.warning("connections closed so far: %s", ", ".join(f"{n} × {why}" for why, n in self.closed.items()))

    def _counted(self, host: str) -> str:
        """What counts as one address; nothing for this machine and the proxies."""
        ip = _parsed(host)
        trusted = ip is not None and (ip.is_loopback or any(ip in network for network in self.bounds.proxies))
        return "" if trusted else address_of(host)


def address_of(host: str) -> str:
    """What counts as one client: an IPv4 address, or a whole network of IPv6, of which a client has addresses at will.

    What is no address is returned as it is.
    """
    ip = _parsed(host)
    if ip is None:
        return host
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network(f"{ip}/64", strict=False))


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
