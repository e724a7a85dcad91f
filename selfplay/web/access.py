"""Who may talk to API and page: bearer token or login cookie, Host and Origin, sizes of requests, headers of answers.

On a loopback address without a token whoever has an account on the machine may; Host and Origin still keep web pages of
others out (DNS rebinding, forged requests). With a token all but `/healthz`, `/readyz` and the login asks for it.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError
from selfplay.web.sessions import Sessions, bearer, configured_token

OPEN = ("/healthz", "/readyz", "/login")
LARGEST = {"/api/prompts": 8 << 20, "/login": 4 << 10}  # bytes of a request's body
LARGEST_ELSE = 64 << 10
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with no-referrer a browser hides the origin of the page's own forms too
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
# The page's framework compiles templates, hence 'unsafe-eval'; only scripts with the nonce of the answer run inline, so
# text that became markup by mistake could still run nothing.
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-eval'{nonce}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "font-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(service: ServiceConfig) -> str | None:
    """The bearer token, from its file or the environment; None where there is none and none is needed.

    Raises ConfigError for an address that others can reach without a token, and as `sessions.configured_token` does.
    """
    token = configured_token(service)
    require_token(service, token)
    return token


def require_token(service: ServiceConfig, token: str | None) -> None:
    """Raise ConfigError where others could reach API and page without a token."""
    if token is None and not is_loopback(service.host):
        raise ConfigError(
            f"service.host is {service.host}, which other machines can reach, and there is no token",
            f"put one into the environment variable {service.token_env} or into a file named by service.token_file "
            "(openssl rand -hex 24 makes one), or set service.host to 127.0.0.1",
        )


class Refusal(NamedTuple):
    """Why a request is turned away."""

    status: int
    why: str
    retry_after: int = 0
    """Seconds; 0 where another try is no use."""


class Guard:
    """ASGI middleware that turns away what should not reach the app, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, service: ServiceConfig, sessions: Sessions | None) -> None:
        self.app, self.sessions = app, sessions
        self.names = {"localhost", socket.gethostname().lower(), service.host.lower(), *map(str.lower, service.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        # The server has taken in what configured proxies say of a client. Nobody behind here is to believe more, from anybody.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if not name.startswith(b"x-forwarded-")]
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        sessions, path = self.sessions, scope["path"]

        def admitted() -> bool:
            return sessions is None or path in OPEN or sessions.admits(headers)

        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, *_while_admitted(receive, send, admitted))
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": refusal.why})
            return
        answer = _Answer(send, admitted)
        if refusal is None:
            await self.app(scope, _bounded(receive, _largest(scope)), answer.send)
        elif refusal.status == 401 and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await _redirect(answer.send, "/login")
        else:
            await _refuse(answer.send, refusal)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        """Why a request is turned away, or None."""
        host, path = headers.get("host", ""), scope["path"]
        if not self.knows(host):
            return Refusal(403, "this name is not one of the service: add it to service.hosts")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return Refusal(403, "the request comes from a page of another origin")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope.get("method") != "GET":
            return Refusal(403, "the request comes from a page of another site")
        if path not in OPEN and (refusal := self._unknown(scope, headers)) is not None:
            return refusal
        if scope["type"] == "websocket":
            return None
        if scope["method"] == "POST" and path.startswith("/api/"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return Refusal(415, "the body must be JSON (content-type: application/json)")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _largest(scope):
            return Refusal(413, f"the body may have {_largest(scope)} bytes")
        return None

    def _unknown(self, scope: Scope, headers: Headers) -> Refusal | None:
        """Why a request without the right token or cookie is turned away. After some wrong tokens its address has to wait, with the
        right one too: else the answer would say which one it is. Cookies of that address hold on."""
        if self.sessions is None:
            return None
        tries = bearer(headers) is not None
        host, _ = scope.get("client") or ("", 0)
        if tries and (seconds := self.sessions.attempts.wait(host)):
            return Refusal(429, f"too many wrong tokens from this address: try again in {seconds} seconds", seconds)
        if self.sessions.admits(headers):
            return None
        if tries:
            self.sessions.attempts.wrong(host)
        return Refusal(401, "the bearer token of the service is needed")

    def knows(self, host: str) -> bool:
        """Whether a Host header names this service. Of numbers all do: only a name can be made to lead elsewhere."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _largest(scope: Scope) -> int:
    return LARGEST.get(scope["path"], LARGEST_ELSE)


def _bounded(receive: Receive, limit: int) -> Receive:
    """`receive` that raises HTTPException 413 once a body of unknown length is longer than it may be."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, f"the body may have {limit} bytes")
        return message

    return bounded


def _while_admitted(receive: Receive, send: Send, admitted: Callable[[], bool]) -> tuple[Receive, Send]:
    """`receive` and `send` of a WebSocket, which say no more once its session has ended."""
    closed = False

    async def is_over() -> bool:
        nonlocal closed
        if not closed and not admitted():
            closed = True
            await send({"type": "websocket.close", "code": 1008, "reason": "the session has ended"})
        return closed

    async def hear() -> Message:
        message = await receive()
        if message["type"] == "websocket.receive" and await is_over():
            return {"type": "websocket.disconnect", "code": 1008}
        return message

    async def say(message: Message) -> None:
        if not await is_over():
            await send(message)

    return hear, say


class _Answer:
    """Sends an answer on with the security headers. A page is held back until it is whole, to put in its nonce. A stream of
    events ends when the session of who follows it ends."""

    def __init__(self, send: Send, admitted: Callable[[], bool]) -> None:
        self._send, self._admitted = send, admitted
        self._streams = self._ended = False
        self._page: bytearray | None = None
        self._start: Message = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            kind = headers.get("content-type", "")
            if kind.startswith("text/html") and "content-security-policy" not in headers:
                self._start, self._page = message, bytearray()
                return
            self._streams = kind.startswith("text/event-stream")
            headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
        elif self._page is not None and message["type"] == "http.response.body":
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return
            await self._send_page(bytes(self._page))
            return
        elif self._streams:
            if self._ended:
                return
            if not self._admitted():
                self._ended, message = True, {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _send_page(self, page: bytes) -> None:
        nonce = secrets.token_urlsafe(16)
        headers = MutableHeaders(scope=self._start)
        headers["content-security-policy"] = POLICY.format(nonce=f" 'nonce-{nonce}'")
        if (
            "content-encoding" not in headers
        ):  # text of others has no `<` in a page: what begins a script is the page's own
            page = page.replace(b"<script", f'<script nonce="{nonce}"'.encode())
        headers["content-length"] = str(len(page))
        await self._send(self._start)
        await self._send({"type": "http.response.body", "body": page})


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps({"detail": refusal.why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry_after:
        headers.append((b"retry-after", str(refusal.retry_after).encode()))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, to: str) -> None:
    await send({"type": "http.response.start", "status": 303, "headers": [(b"location", to.encode())]})
    await send({"type": "http.response.body", "body": b""})
