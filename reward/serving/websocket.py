"""WebSockets of uvicorn, on a connection that began as HTTP and keeps its place among the others."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

UNREAD_SECONDS = 30.0  # for messages that nobody takes


class WebSocket(WebSocketsSansIOProtocol):
    """`left` is called when the connection has ended."""

    def __init__(self, *args: Any, left: Callable[[], None], **more: Any) -> None:
        super().__init__(*args, **more)
        self._left = left
        self._unread: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
