"""HTTP/1.1 for all that this program asks of others, who may be broken or hostile.

- A request ends at its time, whatever comes: a status line, headers, chunks, trailers or interim answers that drip.
- Bytes are counted as they come, and bounded. Nothing is decompressed: none is asked for, and what comes so is refused.
- What comes on a connection that was used before may be a late answer to an earlier request. So a connection is used
  again only for a service whose answers name their requests (`Answer.named`), and an answer of success that comes on it
  has to do so too. A connection that had a fault, or has a byte left to read, is closed.
- Redirects are not followed. A proxy is used where one is given, and not because the environment names one.
"""

import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import h11

from reward.addresses import Address, InvalidAddress, address
from reward.faults import ConnectError, HttpError, LateAnswer, ProtocolError
from reward.proxies import proxy_address, tunnel
from reward.wire import Wire, connect

__all__ = [
    "Answer",
    "ConnectError",
    "Http",
    "HttpError",
    "InvalidAddress",
    "LateAnswer",
    "ProtocolError",
    "ask",
    "bearer",
]

HEADS = 64 * 2**10  # bytes of headers, of trailers, or of one line of a chunk
INTERIM = 16  # answers such as 100 Continue before the real one
CONNECT = 10.0  # seconds at most for a connection
IDLE = 30.0  # seconds after which a connection is not used again


@dataclass(slots=True, kw_only=True)
class Answer:
    """`headers` with names in lower case. `content` may be cut off unless it is an answer of success."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    reused: bool
    """Whether the connection had been used before."""
    named: bool = False
    """To be set by who reads it and finds that it names its request."""

    @property
    def success(self) -> bool:
        return 200 <= self.status < 300

    def said(self, key: str | None) -> str:
        """How the content begins, for a message. Some servers repeat the key in it: it is left out."""
        text = self.content[:2000].decode("utf-8", "replace")
        return (text.replace(key.strip(), "…") if key else text)[:300]


@dataclass(slots=True)
class Connection:
    """A wire, and what was said by HTTP on it."""

    wire: Wire
    spoken: h11.Connection = field(default_factory=lambda: h11.Connection(h11.CLIENT, HEADS))
    used: float = 0.0
    """When its last answer was whole, by time.monotonic()."""


class Http:
    """Keeps at most `kept` connections for each service. Several threads may use it. `headers` go with each request, and
    `proxy` is the address of an HTTP proxy. Raises InvalidAddress for one that is none."""

    def __init__(self, kept: int = 0, headers: Mapping[str, str] | None = None, proxy: str | None = None) -> None:
        self._kept, self._headers = kept, dict(headers or {})
        self._proxy = proxy_address(proxy) if proxy else None
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._kept = 0
            idle, self._idle = self._idle, {}
        for connection in (c for some in idle.values() for c in some):
            connection.wire.close()

    @contextmanager
    def ask(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        limit: int,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        fresh: bool = False,
    ) -> Iterator[Answer]:
        """The answer to a request, for a reader who may set `named`.

        seconds: for all of it, by the clock on the wall.
        limit: the most bytes of content. With 0 no content is read. What is longer is an error in an answer of success,
            and is cut off in another.
        fresh: over a new connection.
        Raises HttpError, and InvalidAddress.
        """
        end = time.monotonic() + seconds
        to = address(url)
        kept = None if fresh else self._take(to)
        connection = kept or opened(to, self._proxy, min(end, time.monotonic() + CONNECT))
        whole = False
        try:
            given = {"host": to.authority, "accept": "*/*", "accept-encoding": "identity"} | self._headers
            if to.login and "authorization" not in given:
                given["authorization"] = to.login
            given |= headers or {}
            if body is not None:
                given["content-length"] = str(len(body))
            try:
                answer, whole = _exchange(connection, method, to.target, given, body or b"", end, limit)
            except h11.ProtocolError as error:
                raise ProtocolError(str(error)) from error
            answer.reused = kept is not None
            yield answer
            if answer.reused and answer.success and not answer.named:
                raise ProtocolError("an answer that does not name its request, on a connection of earlier ones")
            whole = whole and answer.named
        except BaseException:
            whole = False
            raise
        finally:
            if whole:
                self._keep(to, connection)
            else:
                connection.wire.close()

    def _take(self, to: Address) -> Connection | None:
        """A connection that is whole still."""
        while True:
            with self._lock:
                idle = self._idle.get(to.origin)
                if not idle:
                    return None
                connection = idle.pop()
            if time.monotonic() - connection.used < IDLE and connection.wire.silent:
                return connection
            connection.wire.close()

    def _keep(self, to: Address, connection: Connection) -> None:
        connection.spoken.start_next_cycle()
        connection.used = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(to.origin, [])
            if len(idle) < self._kept:
                idle.append(connection)
                return
        connection.wire.close()


def ask(
    method: str,
    url: str,
    *,
    seconds: float,
    limit: int,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    proxy: str | None = None,
) -> Answer:
    """One request over a connection of its own; see Http and Http.ask."""
    with Http(proxy=proxy).ask(method, url, seconds=seconds, limit=limit, body=body, headers=headers) as answer:
        return answer


def bearer(key: str) -> str:
    """The value of the Authorization header for a key. A line end or blanks around it are no part of it: a file often ends so.

    Raises ValueError for what no header can hold. Its text leaves the key out.
    """
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("the key is empty, or has characters that no header of HTTP can hold")
    return f"Bearer {key}"


def opened(to: Address, proxy: Address | None, end: float, trust: ssl.SSLContext | None = None) -> Connection:
    """A new connection, by TLS where the address says so, to whom `trust` trusts. Raises HttpError."""
    first = proxy or to
    wire = connect(first.host, first.port, end)
    try:
        if proxy is not None:
            tunnel(wire, proxy, to, end)
        if to.scheme == "https":
            wire.secure(to.host, end, trust)
    except BaseException:
        wire.close()
        raise
    return Connection(wire)


def _exchange(
    connection: Connection, method: str, target: str, headers: Mapping[str, str], body: bytes, end: float, limit: int
) -> tuple[Answer, bool]:
    """The answer, and whether the connection could take another request after it."""
    wire, spoken = connection.wire, connection.spoken
    try:
        said = spoken.send(h11.Request(method=method, target=target, headers=list(headers.items())))
    except (h11.LocalProtocolError, UnicodeEncodeError):  # its text quotes the header, which may be a secret
        raise ProtocolError("the request has a header that HTTP does not allow") from None
    said = b"".join(
        [said or b"", (spoken.send(h11.Data(body)) if body else b"") or b"", spoken.send(h11.EndOfMessage()) or b""]
    )
    sent = wire.send(said, end)
    answer: Answer | None = None
    content = bytearray()
    came = interim = 0
    while True:
        if time.monotonic() > end:  # thousands of small events in what came at once take time, too
            raise LateAnswer("no whole answer in time")
        event = spoken.next_event()
        if event is h11.NEED_DATA:
            data = wire.receive(end)
            if not data and answer is None:
                raise ProtocolError("Server disconnected without sending a response.")
            came += len(data)
            if came > limit + HEADS:  # chunks of a byte, interim answers: much that comes to little
                if answer is None or answer.success:
                    raise ProtocolError(f"an answer of more than {limit} bytes")
                break
            spoken.receive_data(data)
        elif isinstance(event, h11.Response):
            answer = Answer(status=event.status_code, headers=_named(event), content=b"", reused=False)
            if not sent and answer.status < 400:
                raise ProtocolError("an answer that came before the whole request was sent")
            if limit == 0:
                break
            if answer.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                if answer.success:
                    raise ProtocolError("a compressed answer, which was not asked for")
                break
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > limit:
                assert answer is not None, "content comes after a head"
                if answer.success:
                    raise ProtocolError(f"an answer of more than {limit} bytes")
                break
        elif isinstance(event, h11.EndOfMessage):
            assert answer is not None, "an end comes after a head"
            answer.content = bytes(content)
            clean = spoken.our_state is spoken.their_state is h11.DONE and not spoken.trailing_data[0]
            return answer, clean and sent and wire.silent
        elif isinstance(event, h11.InformationalResponse):
            interim += 1
            if interim > INTERIM:
                raise ProtocolError(f"more than {INTERIM} interim answers")
        else:
            raise ProtocolError("an answer that ends before it begins")
    assert answer is not None, "a loop that ends has seen a head"
    answer.content = bytes(content[:limit])
    return answer, False


def _named(event: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
