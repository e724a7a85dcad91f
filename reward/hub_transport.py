"""How requests to the Hub go: by HTTP/1.1 as in `reward.http`, but with contents that stream, for weights have gigabytes.

- Each request has a connection of its own, so no answer can be taken for that of another request.
- What is waited for in all is bounded by PATIENCE and the bytes that moved: below RATE a transfer ends, however it drips. The
  library goes on with a file where it ended.
- An answer that is kept in memory has WHOLE bytes at most. Nothing is decompressed: none is asked for, and what comes so is
  refused.
- A proxy is used where the environment names one (HTTPS_PROXY, NO_PROXY), as the tools of the Hub do. Redirects are followed by
  the library, which sends the key to no other host.
"""

import importlib
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

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

T = TypeVar("T")

PATIENCE = 300.0  # seconds, for a request that says nothing itself: a commit of many gigabytes may take minutes
RATE = 64 * 2**10  # bytes a second
WHOLE = 64 * 2**20
PIECE = 2**20  # bytes that are sent with one wait


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
            to = address(str(request.url))
            pace = Pace((request.extensions.get("timeout") or {}).get("read") or PATIENCE)
            proxy = _proxy(to)
            connection = pace.wait(lambda end: opened(to, proxy, min(end, time.monotonic() + CONNECT), _tls()))
            try:
                _send(connection, request, to, pace)
                head = _head(connection, pace)
            except BaseException:
                connection.wire.close()
                raise
        return httpx.Response(
            head.status_code, headers=head.headers.raw_items(), extensions={"http_version": b"HTTP/1.1"},
            stream=Content(request, connection, pace, request.extensions["limit"]),
        )  # fmt: skip


class Pace:
    """What a transfer may still take. `patience`: seconds until it begins, and between two pieces of it."""

    def __init__(self, patience: float) -> None:
        self._patience, self._waited = min(patience, PATIENCE), 0.0
        self.moved = 0
        """Bytes that came or went."""

    def wait(self, work: Callable[[float], T]) -> T:
        """Do what waits for the other side, and ends at the given time.monotonic(). What the reader does between is not counted."""
        began = time.monotonic()
        left = self._patience + self.moved / RATE - self._waited
        try:
            return work(began + min(left, self._patience))
        finally:
            self._waited += time.monotonic() - began


class Content(httpx.SyncByteStream):
    """The content of an answer, piece by piece. limit: its most bytes."""

    def __init__(self, request: httpx.Request, connection: Connection, pace: Pace, limit: int | None) -> None:
        self._request, self._connection, self._pace, self._limit = request, connection, pace, limit

    def __iter__(self) -> Iterator[bytes]:
        came = 0
        with _errors(self._request):
            while not isinstance(event := _next(self._connection, self._pace), h11.EndOfMessage):
                assert isinstance(event, h11.Data), "content comes after a head"
                came += len(event.data)
                if self._limit is not None and came > self._limit:
                    raise ProtocolError(f"an answer of more than {self._limit} bytes")
                yield bytes(event.data)

    def close(self) -> None:
        self._connection.wire.close()


def _send(connection: Connection, request: httpx.Request, to: Address, pace: Pace) -> None:
    """What the server answers before it has everything is read next."""
    headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"accept-encoding"]
    headers.append((b"accept-encoding", b"identity"))

    def send(event: h11.Request | h11.Data | h11.EndOfMessage) -> bool:
        said = connection.spoken.send(event) or b""
        whole = pace.wait(lambda end: connection.wire.send(said, end))
        pace.moved += len(said)
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
        event = _next(connection, pace)
        if isinstance(event, h11.Response):
            encodings = [value.lower() for name, value in event.headers if name == b"content-encoding"]
            if not set(encodings) <= {b"", b"identity"}:
                raise ProtocolError("a compressed answer, which was not asked for")
            return event
        if not isinstance(event, h11.InformationalResponse):
            break
    raise ProtocolError("no answer begins")


def _next(connection: Connection, pace: Pace) -> h11.Event:
    """The next event of the answer."""
    while not isinstance(event := connection.spoken.next_event(), h11.Event):  # it needs data
        data = pace.wait(connection.wire.receive)
        pace.moved += len(data)
        connection.spoken.receive_data(data)
    return event


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
    except InvalidAddress as error:
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
