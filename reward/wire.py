"""A TCP or TLS connection on which every wait ends at a given time, whatever the other side sends or does not send."""

import os
import queue
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from reward import polling
from reward.faults import ConnectError, LateAnswer, ProtocolError

T = TypeVar("T")

READ = 64 * 2**10  # bytes that are taken at once
INTERIM = (b"HTTP/1.1 1", b"HTTP/1.0 1")  # how an answer begins after which the real one follows


class Wire:
    """One connection. Times are those of time.monotonic(). One thread at a time may use it.

    Every method raises LateAnswer once `end` has passed, and ProtocolError where the connection breaks.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._early = bytearray()

    def secure(self, host: str, end: float, trust: ssl.SSLContext | None = None) -> None:
        """Go on by TLS, with a server that proves to be `host`. Raises ConnectError for one that does not."""
        try:
            self._socket = (trust or tls()).wrap_socket(
                self._socket, server_hostname=host, do_handshake_on_connect=False
            )
            self._attempt(self._socket.do_handshake, select.POLLIN, end)
        except LateAnswer:
            raise ConnectError("the TLS handshake did not end in time") from None
        except (OSError, ValueError) as error:  # ValueError for a name that no certificate can have
            raise ConnectError(str(error)) from error

    def send(self, data: bytes, end: float) -> bool:
        """Whether all of it was sent. It was not where the other side answers, or hangs up, before that."""
        rest = memoryview(data)
        with suppress(OSError):  # it hung up; what it said before that is read next
            while rest:
                said = self._wait(select.POLLIN | select.POLLOUT, end)
                if said & ~select.POLLOUT and self._answers_early():
                    return False
                if said & select.POLLOUT:
                    with suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        rest = rest[self._socket.send(rest[:READ]) :]
        return not rest

    def receive(self, end: float) -> bytes:
        """What has come, READ bytes at most; nothing once the other side has hung up."""
        if self._early:
            early, self._early = bytes(self._early), bytearray()
            return early
        try:
            return self._attempt(lambda: self._socket.recv(READ), select.POLLIN, end)
        except ssl.SSLEOFError:
            return b""
        except OSError as error:
            raise ProtocolError(str(error)) from error

    @property
    def silent(self) -> bool:
        """Whether nothing waits to be read: no byte of an answer that nobody asked for, and no end."""
        held = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        return not self._early and not held and not _poll(self._socket, select.POLLIN, 0)

    def close(self) -> None:
        self._socket.close()

    def _answers_early(self) -> bool:
        try:
            said = self._socket.recv(READ)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False  # a record of TLS without data
        self._early += said
        known = min(len(self._early), len(INTERIM[0]))
        interim = any(self._early[:known] == start[:known] for start in INTERIM)
        return not said or not interim or len(self._early) > READ

    def _attempt(self, work: Callable[[], T], first: int, end: float) -> T:
        """What `work` gives once the socket is ready for it."""
        events = 0 if isinstance(self._socket, ssl.SSLSocket) else first  # TLS may hold what the socket shows no more
        while True:
            self._wait(events, end)
            try:
                return work()
            except (BlockingIOError, ssl.SSLWantReadError):
                events = select.POLLIN
            except ssl.SSLWantWriteError:
                events = select.POLLOUT

    def _wait(self, events: int, end: float) -> int:
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise LateAnswer("no whole answer in time")
        if not events:
            return 0
        if not (said := _poll(self._socket, events, seconds)):
            raise LateAnswer("no whole answer in time")
        return said


def connect(host: str, port: int, end: float) -> Wire:
    """A connection to any address of `host`, each of which gets a share of the time. Raises ConnectError."""
    places = _resolve(host, port, end)
    last: Exception = ConnectError(f"{host} has no address")
    for tried, (family, _, _, _, place) in enumerate(places):
        now = time.monotonic()
        until = now + (end - now) / (len(places) - tried)
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setblocking(False)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with suppress(BlockingIOError):
                opened.connect(place)
            if not _poll(opened, select.POLLOUT, until - time.monotonic()):
                raise TimeoutError("timed out")
            if failed := opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(failed, os.strerror(failed))
            return Wire(opened)
        except OSError as error:
            opened.close()
            last = error
    raise ConnectError(str(last)) from last


@cache
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _poll(on: socket.socket, events: int, seconds: float) -> int:
    return polling.wait({on: events}, seconds).get(on, 0)


def _resolve(host: str, port: int, end: float) -> list[Any]:
    """The addresses of a host. A resolver that does not answer is left alone in a thread of its own."""
    with suppress(socket.gaierror):
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    found: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def look() -> None:
        try:
            found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.put(error)

    threading.Thread(target=look, name="resolver", daemon=True).start()
    try:
        answer = found.get(timeout=max(end - time.monotonic(), 0.0))
    except queue.Empty:
        raise ConnectError(f"the address of {host} was not found in time") from None
    if isinstance(answer, Exception):
        raise ConnectError(str(answer)) from answer
    return answer
