"""What both servers bound: who may stay connected, for how long, and what a client can make them keep. On real sockets."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from reward.serving import protocol
from reward.serving.connections import Bounds, Connections

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


App = SimpleNamespace


@pytest.fixture
def serve(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., App]]:
    """Starts bounded servers of a small app: `/healthz`, `/body` reads its body, `/wait` waits, `/large` answers much."""
    caplog.set_level(logging.INFO)
    started: list[tuple[uvicorn.Server, threading.Thread, threading.Event]] = []

    def start(places: int = 16, body_bytes: int = 1 << 20) -> App:
        app, go = FastAPI(), threading.Event()

        @app.get("/healthz")
        async def healthz() -> Response:
            return Response("well")

        @app.post("/body")
        async def body(request: Request) -> Response:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
            return Response(f"got {size}")

        @app.post("/refuse")
        async def refuse() -> Response:
            return Response("no", 413)

        @app.get("/wait")
        def wait() -> Response:
            return Response(str(go.wait(60)))

        @app.get("/large")
        async def large() -> Response:
            return Response(b"x" * (16 << 20))

        found = Connections(Bounds(connections=places, body_bytes=body_bytes))
        listener = socket.create_server(("127.0.0.1", 0))
        quick = {"timeout_keep_alive": 1, "timeout_graceful_shutdown": 1}
        config = protocol.configure(app, found, 64, ws="none", lifespan="off", **quick)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        started.append((server, thread, go))
        until(lambda: server.started)
        return App(at=listener.getsockname(), connections=found, go=go)

    yield start
    for server, thread, go in started:
        go.set()
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
    said = [*caplog.get_records("call"), *caplog.records]
    assert not [record.getMessage() for record in said if record.levelno >= logging.ERROR]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(app: App, said: bytes = b"") -> socket.socket:
    found = socket.create_connection(app.at, timeout=60)
    found.sendall(said)
    return found


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side closes, or a body that is whole; nothing of a connection that was cut."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            data += part
            head, end, body = data.partition(b"\r\n\r\n")
            if end and b"content-length: %d\r\n" % len(body) in head + b"\r\n":
                break
    return data


def status(connection: socket.socket) -> int:
    return int((answer(connection) or b"x 0").split()[1])


def closes(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            pass
    return True


def drip(connection: socket.socket, what: bytes) -> None:
    """Send byte after byte until the other side has enough of it."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(what)
            time.sleep(0.02)


HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /body HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("said", "more"),
    [
        (b"", b""),
        (HEAD, b"a: b\r\n"),
        (b"GET /", b"a"),
        (HEALTH, b""),  # kept open after an answer
        (HEALTH + HEAD, b"a: b\r\n"),
        (POST + b"Content-Length: 9000\r\n\r\n", b"a"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a"),
        (POST.replace(b"/body", b"/refuse") + b"Content-Length: 9000\r\n\r\n", b"a"),
    ],
)
def test_a_client_that_says_nothing_or_drips_is_closed(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch, said: bytes, more: bytes
) -> None:
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "REFUSED_SECONDS"):
        monkeypatch.setattr(protocol, name, 0.4)
    app = serve()
    with connect(app, said) as connection:
        if more:
            drip(connection, more)
        assert closes(connection)
    until(lambda: len(app.connections) == 0)


def test_a_body_that_comes_steadily_may_take_its_time(
    serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(protocol, "BODY_BYTES", 2)
    with connect(serve(), POST + b"Content-Length: 60\r\n\r\n") as connection:
        for _ in range(60):
            connection.sendall(b"a")
            time.sleep(0.02)
        assert b"got 60" in answer(connection)


@pytest.mark.parametrize(
    ("said", "more"),
    [
        (HEAD, b"x: " + b"a" * 30_000 + b"\r\n"),
        (HEAD, b"a: b\r\n" * 2000),
        (HEAD + b"x: ", b"a" * 65536),
        (b"GET /", b"a" * 65536),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a" * 65536),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 9000),
        (b"\r\n", b"\r\n" * 30_000),
    ],
)  # fmt: skip
def test_what_never_ends_is_refused_at_once(serve: Callable[..., App], said: bytes, more: bytes) -> None:
    app, sent = serve(), 0
    with connect(app, said) as connection:
        with contextlib.suppress(ConnectionError):
            while sent < 64 << 20:
                connection.sendall(more)
                sent += len(more)
        assert sent < 32 << 20  # what the buffers of the kernel take, at most
    until(lambda: len(app.connections) == 0)
    assert status(connect(app, HEALTH)) == 200


def test_a_refused_body_is_read_a_little_further_and_no_more(serve: Callable[..., App]) -> None:
    app = serve()
    refused = POST.replace(b"/body", b"/refuse")
    with connect(app, refused + b"Content-Length: 100000\r\n\r\n") as connection:
        connection.sendall(b"a" * 100_000)
        assert status(connection) == 413
        connection.sendall(HEALTH)  # the body was read to its end, and the connection can be used again
        assert status(connection) == 200
    sent = 0
    with connect(app, refused + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        with contextlib.suppress(ConnectionError):
            while sent < 256 << 20:
                connection.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
                sent += 65536
        assert 1 << 20 < sent < 64 << 20


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nhost: evil.example\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * (17 << 10) + b"\r\n\r\n",
    ],
)
def test_requests_that_are_none_are_bad_requests(serve: Callable[..., App], head: bytes) -> None:
    with connect(serve(), head) as connection:
        assert status(connection) == 400 and closes(connection)


def test_a_body_that_breaks_its_form_ends_its_request(serve: Callable[..., App]) -> None:
    app = serve()
    for path in (b"/body", b"/refuse"):
        head = POST.replace(b"/body", path) + b"Transfer-Encoding: chunked\r\n\r\n"
        with connect(app, head + b"3\r\nabc\r\n") as connection:
            if path == b"/refuse":
                assert status(connection) == 413
            connection.sendall(b"zzz\r\n")
            assert closes(connection)
    until(lambda: len(app.connections) == 0)


def test_health_is_answered_among_idle_slow_and_waiting_clients(serve: Callable[..., App]) -> None:
    app = serve(places=16)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(app, HEALTH.replace(b"/healthz", b"/wait"))) for _ in range(16)]
        until(lambda: len(app.connections) == 14)
        # 14 wait, two places are spare: what would wait too is told so at once
        until(lambda: sum(status_now(one) == 503 for one in waiting) == 2)
        for said in (b"", HEAD, POST + b"Content-Length: 9000\r\n\r\na"):
            for _ in range(40):
                stack.enter_context(connect(app, said))
            with connect(app, HEALTH) as asked:
                assert answer(asked).endswith(b"well")
            assert len(app.connections) <= 16
        app.go.set()
        assert sum(status(one) == 200 for one in waiting) == 14


def status_now(connection: socket.socket) -> int:
    """The status of an answer that has come already; 0 while none has."""
    connection.setblocking(False)
    try:
        return int(connection.recv(100, socket.MSG_PEEK).split()[1])
    except (BlockingIOError, IndexError):
        return 0
    finally:
        connection.settimeout(60)


def test_clients_that_leave_are_no_errors(serve: Callable[..., App]) -> None:
    """What the log may hold is asserted where the server ends."""
    app = serve()
    for said in (POST + b"Content-Length: 9\r\n\r\na", HEALTH.replace(b"/healthz", b"/large"), HEAD):
        for _ in range(5):
            with connect(app, said) as connection:
                time.sleep(0.02)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # with a reset
    until(lambda: len(app.connections) == 0)


def test_an_answer_that_nobody_takes_is_given_up(serve: Callable[..., App], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "UNREAD_SECONDS", 0.3)
    app = serve()
    with connect(app, HEALTH.replace(b"/healthz", b"/large")):
        until(lambda: len(app.connections) == 1)
        until(lambda: len(app.connections) == 0)


def test_a_request_in_pieces_and_two_at_once_are_answered(serve: Callable[..., Any]) -> None:
    app = serve()
    with connect(app) as connection:
        for byte in HEALTH:
            connection.sendall(bytes([byte]))
        assert status(connection) == 200
        connection.sendall(HEALTH + POST + b"Content-Length: 3\r\nConnection: close\r\n\r\nabc")
        both = b""
        while part := connection.recv(65536):
            both += part
        assert both.count(b"HTTP/1.1 200") == 2 and both.endswith(b"got 3")
    with connect(app, POST + b"Content-Length: 300000\r\n\r\n" + b"a" * 300_000) as connection:
        assert b"got 300000" in answer(connection)
