"""How requests to the Hub go: by HTTP/1.1 as in `reward.http`, but with contents that stream, for weights have gigabytes.

- Each request has a connection of its own, so no answer can be taken for that of another request.
- An answer that is kept in memory has PATIENCE seconds in all, or those that its request says. Weights stream: below RATE they
  end, however they drip, and the library goes on with a file where it ended.
- An answer that is kept in memory, or does not say how long it is, has WHOLE bytes at most. Nothing is decompressed: none is asked for, and what comes so is
  refused.
- What streams has the bytes that its answer announced, and no more.
- A proxy is used where the environment names one (HTTPS_PROXY, NO_PROXY), as the tools of the Hub do. Redirects are followed by
  the library, which sends the key to no other host. One that leads from TLS to a connection without it is refused.
"""

import importlib
import ssl
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import certifi
import h11
import huggingface_hub

from reward.addresses import Address, InvalidAddress, address
from reward.faults import ConnectError, LateAnswer, ProtocolError
from reward.http import CONNECT, INTERIM, Connection, opened
from reward.proxies import proxy_address

DEFAULT = huggingface_hub.get_session()
if TYPE_CHECKING:
    import httpx2 as httpx
else:  # one of several libraries with this interface
    httpx = importlib.import_module(type(DEFAULT).__module__.partition(".")[0])

PATIENCE = 300.0  # seconds, for a request that says nothing itself: a commit of many gigabytes may take minutes
RATE = 64 * 2**10  # bytes a second
WHOLE = 64 * 2**20
PIECE = 2**20  # bytes that are sent with one wait, or handed on


class Client(httpx.Client):
    """Tells the transport whether an answer streams, also after a redirect."""

    def send(self, request: httpx.Request, *, stream: bool = False, **how: Any) -> httpx.Response:
        request.extensions = {**request.extensions, "limit": None if stream else WHOLE}
        return super().send(request, stream=stream, **how)


def client() -> httpx.Client:
    """A client for `huggingface_hub.set_client_factory`."""
    return Client(
        transport=Transport(), event_hooks=DEFAULT.event_hooks, follow_redirects=True, timeout=None, trust_env=False
    )


class Transport(httpx.BaseTransport):
    """Several threads may use it. Raises the errors of the client's library."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with _errors(request):
            to, limit = address(str(request.url)), request.extensions["limit"]
            pace = Pace((request.extensions.get("timeout") or {}).get("read") or PATIENCE, streams=limit is None)
            connection = opened(to, _proxy(to), min(pace.end, time.monotonic() + CONNECT), _tls())
            try:
                _send(connection, request, to, pace)
                head = _head(connection, pace)
                _require_tls_again(request, head)
            except BaseException:
                connection.wire.close()
                raise
        if not any(name == b"content-length" for name, _ in head.headers):
            limit = WHOLE  # also of what streams: it would fill the disk
        return httpx.Response(
            head.status_code, headers=head.headers.raw_items(), extensions={"http_version": b"HTTP/1.1"},
            stream=Content(request, connection, pace, limit),
        )  # fmt: skip


class Pace:
    """How long a transfer may take. `patience`: seconds until an answer begins, and between two pieces of one that streams; of one
    that is kept in memory, for all of it. What is sent earns time, and so does what streams."""

    def __init__(self, patience: float, *, streams: bool) -> None:
        self._patience, self._streams = min(patience, PATIENCE), streams
        self._until = time.monotonic() + self._patience

    @property
    def end(self) -> float:
        """When the next wait is over, by time.monotonic()."""
        return min(self._until, time.monotonic() + self._patience)

    def check(self) -> None:
        """Raise LateAnswer where the time is over: thousands of small pieces in what came at once take time, too."""
        if time.monotonic() > self._until:
            raise LateAnswer("no whole answer in time")

    def sent(self, count: int) -> None:
        self._until += count / RATE

    def came(self, count: int) -> None:
        self._until += count / RATE if self._streams else 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What its reader takes is not the server's time."""
        began = time.monotonic()
        yield
        self._until += time.monotonic() - began


class Content(httpx.SyncByteStream):
    """The content of an answer, in pieces of what has come. limit: its most bytes."""

    def __init__(self, request: httpx.Request, connection: Connection, pace: Pace, limit: int | None) -> None:
        self._request, self._connection, self._pace, self._limit = request, connection, pace, limit

    def __iter__(self) -> Iterator[bytes]:
        spoken, pace = self._connection.spoken, self._pace
        piece, length = bytearray(), 0
        with _errors(self._request):
            while not isinstance(event := spoken.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Data):
                    piece += event.data
                    length += len(event.data)
                    pace.came(len(event.data))
                    if self._limit is not None and length > self._limit:
                        raise ProtocolError(f"an answer of more than {self._limit} bytes")
                    if len(piece) < PIECE:
                        pace.check()
                        continue
                if piece:
                    with pace.paused():
                        yield bytes(piece)
                    piece.clear()
                if event is h11.NEED_DATA:
                    spoken.receive_data(self._connection.wire.receive(pace.end))
            if piece:
                yield bytes(piece)

    def close(self) -> None:
        self._connection.wire.close()


def _send(connection: Connection, request: httpx.Request, to: Address, pace: Pace) -> None:
    """What the server answers before it has everything is read next."""
    headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"accept-encoding"]
    headers.append((b"accept-encoding", b"identity"))

    def send(event: h11.Request | h11.Data | h11.EndOfMessage) -> bool:
        said = connection.spoken.send(event) or b""
        whole = connection.wire.send(said, pace.end)
        pace.sent(len(said))
        return whole

    assert isinstance(request.stream, httpx.SyncByteStream)
    if send(h11.Request(method=request.method, target=to.target, headers=headers)):
        for piece in request.stream:
            for start in range(0, len(piece), PIECE):
                if not send(h11.Data(piece[start : start + PIECE])):
                    return
        send(h11.EndOfMessage())


def _head(connection: Connection, pace: Pace) -> h11.Response:
    for _ in range(INTERIM):
        while (event := connection.spoken.next_event()) is h11.NEED_DATA:
            connection.spoken.receive_data(connection.wire.receive(pace.end))
        if isinstance(event, h11.Response):
            encodings = [value.lower() for name, value in event.headers if name == b"content-encoding"]
            if not set(encodings) <= {b"", b"identity"}:
                raise ProtocolError("a compressed answer, which was not asked for")
            return event
        if not isinstance(event, h11.InformationalResponse):
            break
    raise ProtocolError("no answer begins")


def _require_tls_again(request: httpx.Request, head: h11.Response) -> None:
    """Whoever can write to a connection without TLS could answer in the place of the Hub."""
    to = [request.url.join(value.decode("ascii", "replace")) for name, value in head.headers if name == b"location"]
    if request.url.scheme == "https" and not all(url.scheme == "https" for url in to):
        raise ProtocolError("a redirect from https to a connection without TLS")


@contextmanager
def _errors(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except ConnectError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except LateAnswer as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except (ProtocolError, h11.ProtocolError) as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from error
    except (InvalidAddress, httpx.InvalidURL) as error:
        raise httpx.UnsupportedProtocol(str(error), request=request) from error


def _proxy(to: Address) -> Address | None:
    """The proxy that the environment names for an address."""
    named = urllib.request.getproxies()
    url = named.get(to.scheme) or named.get("all")
    return proxy_address(url) if url and not urllib.request.proxy_bypass(to.host) else None


@cache
def _tls() -> ssl.SSLContext:
    """Trusts whom the system trusts and, for a container that knows nobody, whom browsers trust."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context
