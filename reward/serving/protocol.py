"""HTTP/1.1 of uvicorn, on h11, with bounds: each wait for a client ends at a time, and each part of a request at a size.

h11 refuses a request with two Host headers, a malformed one, and one whose request line and headers are too long (400).
"""

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

import h11
import uvicorn
from anyio import BrokenResourceError, ClosedResourceError
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from uvicorn._types import ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.h11_impl import H11Protocol

from reward.serving.connections import Connections, Phase

log = logging.getLogger("reward.serving")

HEAD_BYTES = 16 << 10  # of request line and headers; of one line of a chunk, and of trailers
SLICE = 1 << 10  # bytes of a head that are parsed at a time: a head may be longer than HEAD_BYTES by as much
HEAD_SECONDS = 10.0  # for request line and headers to be whole
BODY_SECONDS = 10.0  # in which a body has to end, or to bring as much as this:
BODY_BYTES = 64 << 10
REFUSED_SECONDS, REFUSED_BYTES = 5.0, 1 << 20  # of a body that goes on after its answer, so that the answer arrives
UNREAD_SECONDS = 30.0  # for an answer that nobody takes
HEALTH = "/healthz"  # is answered however busy the server is


class Http(H11Protocol):
    """One connection."""

    def __init__(self, *args: Any, connections: Connections, **more: Any) -> None:
        super().__init__(*args, **more)
        self._connections = connections
        self._inner = self.app
        self.app = self._answer
        self._phase = Phase.HEAD
        self._moved = 0  # bytes of a body since the last look
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._upgraded = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if not self._connections.enter(self, self.client[0] if self.client else ""):
            transport.abort()
            return
        self._wait(Phase.HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.BODY:
            self._moved += len(data)
            self._connections.came(self, len(data))
        elif self._phase is Phase.REFUSED:
            self._moved += len(data)
            if self._moved > REFUSED_BYTES:
                self.cut()
        while data and not self._upgraded and not self.transport.is_closing():
            size = SLICE if self.conn.their_state is h11.IDLE else len(data)
            super().data_received(data[:size])
            data = data[size:]
        if not self._upgraded:
            self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._upgraded:
            self._look()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun already
            self.transport.close()
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        if self._connections.full:
            said = h11.Response(status_code=503, headers=[("connection", "close"), ("content-length", "0")])
            self.transport.write((self.conn.send(said) or b"") + (self.conn.send(h11.EndOfMessage()) or b""))
            self.transport.close()
            self._wait(Phase.LEAVING)
            return
        from reward.serving.websocket import WebSocket  # a server without them needs no package for them

        self._wait(Phase.BUSY)
        self.ws_protocol_class = partial(WebSocket, left=self._left)  # type: ignore[assignment]
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def shutdown(self) -> None:
        if self._phase in (Phase.BODY, Phase.LEAVING):
            self.cut()
        else:
            super().shutdown()

    def cut(self) -> None:
        self.transport.abort()

    def _left(self) -> None:
        self._connections.leave(self)
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()

    def _look(self) -> None:
        """See what the connection waits for now."""
        if self.transport.is_closing():
            phase = Phase.LEAVING
        elif self.conn.their_state is h11.SEND_BODY:
            phase = Phase.REFUSED if self.cycle.response_complete else Phase.BODY
        elif self.conn.their_state is not h11.IDLE:
            phase = Phase.BUSY
        elif self.cycle is not None and self.timeout_keep_alive_task is not None:
            phase = Phase.KEPT
        else:
            phase = Phase.HEAD
        if phase is not self._phase:
            self._wait(phase)

    def _wait(self, phase: Phase) -> None:
        self._phase, self._moved = phase, 0
        self._connections.turn(self, phase)
        if self._late is not None:
            self._late.cancel()
            self._late = None
        seconds = {
            Phase.HEAD: HEAD_SECONDS, Phase.KEPT: self.timeout_keep_alive + REFUSED_SECONDS, Phase.BODY: BODY_SECONDS,
            Phase.REFUSED: REFUSED_SECONDS, Phase.LEAVING: UNREAD_SECONDS,
        }.get(phase)  # fmt: skip
        if seconds is not None:
            self._late = self.loop.call_later(seconds, self._is_late, seconds)

    def _is_late(self, seconds: float) -> None:
        held_up = self.flow.read_paused  # by the app, which does not take more of the body now
        if self._phase is Phase.BODY and (held_up or self._moved >= BODY_BYTES):
            self._moved = 0
            self._late = self.loop.call_later(seconds, self._is_late, seconds)
        else:
            self.cut()

    async def _answer(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """The app, for a request. That a client has left is no error of the app."""
        cycle = self.cycle
        app = service_unavailable if self._connections.full and scope.get("path") != HEALTH else self._inner
        try:
            await app(scope, receive, send)
        except Exception as error:
            if not (cycle.disconnected and all(map(_of_a_client_that_left, _leaves(error)))):
                raise


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


def _of_a_client_that_left(error: BaseException) -> bool:
    return isinstance(error, ClientDisconnect | BrokenResourceError | ClosedResourceError | ConnectionError)


def configure(app: FastAPI, connections: Connections, backlog: int, **settings: Any) -> uvicorn.Config:
    """What a bounded server is started with; `settings` are further ones of uvicorn. `service_unavailable` is its answer to
    a request where too many are being answered already."""
    return uvicorn.Config(
        app,
        http=partial(Http, connections=connections),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=HEAD_BYTES,
        backlog=backlog,
        access_log=False,
        log_config=None,
        log_level="error",  # a warning for each malformed request would fill the log
        **settings,
    )
