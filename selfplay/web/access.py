"""Who may talk to API and page: bearer token or login cookie, Host and Origin, sizes of requests, headers of answers.

On a loopback address without a token whoever has an account on the machine may; Host and Origin still keep web pages of
others out (DNS rebinding, forged requests). With a token all but `/healthz`, `/readyz` and the login asks for it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError

logger = logging.getLogger(__name__)

SHORTEST_TOKEN = 16  # characters
SESSION_SECONDS = 7 * 24 * 3600
OPEN = ("/healthz", "/readyz", "/login")
LARGEST = {"/api/prompts": 8 << 20}  # bytes of a request's body
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

    Raises ConfigError for an address that others can reach without a token, for a token file that cannot be read, and
    for a token that could be guessed.
    """
    token, where = os.environ.get(service.token_env, "").strip(), f"the environment variable {service.token_env}"
    if service.token_file is not None:
        where = str(service.token_file)
        try:
            token = service.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"service.token_file: {service.token_file} cannot be read: {error}") from None
    if token and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ConfigError(
            f"the token in {where} must have at least {SHORTEST_TOKEN} printable ASCII characters",
            "openssl rand -hex 24 makes one",
        )
    if service.token_file is not None and not token:
        raise ConfigError(f"service.token_file: {service.token_file} is empty", "openssl rand -hex 24 makes a token")
    require_token(service, token or None)
    return token or None


def require_token(service: ServiceConfig, token: str | None) -> None:
    """Raise ConfigError where others could reach API and page without a token."""
    if token is None and not is_loopback(service.host):
        raise ConfigError(
            f"service.host is {service.host}, which other machines can reach, and there is no token",
            f"put one into the environment variable {service.token_env} or into a file named by service.token_file "
            "(openssl rand -hex 24 makes one), or set service.host to 127.0.0.1",
        )


class Sessions:
    """Login cookies: an expiry signed with a key that derives from the token. Nothing is kept on either side."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._key = hashlib.sha256(b"selfplay session\0" + self._token).digest()
        # Cookies are shared by all ports of a host: another run there has another token, so another name.
        self.cookie = f"selfplay_{hashlib.sha256(self._key).hexdigest()[:8]}"

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self._token)

    def new(self) -> str:
        head = f"{int(time.time()) + SESSION_SECONDS}.{secrets.token_hex(8)}"
        return f"{head}.{self._sign(head)}"

    def is_valid(self, value: str) -> bool:
        head, _, signature = value.rpartition(".")
        if not hmac.compare_digest(signature.encode("utf-8", "replace"), self._sign(head).encode()):
            return False
        return int(head.partition(".")[0]) > time.time()

    def _sign(self, head: str) -> str:
        return hmac.new(self._key, head.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def admits(self, headers: Headers) -> bool:
        """Whether a request carries the token or a valid cookie."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self.is_token(given.strip())
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and self.is_valid(found.value)


class Guard:
    """ASGI middleware that turns away what should not reach the app, and adds the security headers to every answer."""

    def __init__(self, app: ASGIApp, service: ServiceConfig, sessions: Sessions | None) -> None:
        self.app, self.sessions = app, sessions
        self.names = {"localhost", socket.gethostname().lower(), service.host.lower(), *map(str.lower, service.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal is None:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
            return
        answer = _Answer(send)
        if refusal is None:
            await self.app(scope, _bounded(receive, _largest(scope)), answer.send)
        elif refusal[0] == 401 and scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await _redirect(answer.send, "/login")
        else:
            await _refuse(answer.send, *refusal)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and reason for turning a request away, or None."""
        host, path = headers.get("host", ""), scope["path"]
        if not self.knows(host):
            return 403, "this name is not one of the service: add it to service.hosts"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "the request comes from a page of another origin"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope.get("method") != "GET":
            return 403, "the request comes from a page of another site"
        if self.sessions is not None and path not in OPEN and not self.sessions.admits(headers):
            return 401, "the bearer token of the service is needed"
        if scope["type"] == "websocket":
            return None
        if scope["method"] == "POST" and path.startswith("/api/"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return 415, "the body must be JSON (content-type: application/json)"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > _largest(scope):
            return 413, f"the body may have {_largest(scope)} bytes"
        return None

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


class _Answer:
    """Sends an answer on with the security headers. A page is held back until it is whole, to put in its nonce."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._page: bytearray | None = None
        self._start: Message = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            if headers.get("content-type", "").startswith("text/html"):
                self._start, self._page = message, bytearray()
                return
            headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
        elif self._page is not None and message["type"] == "http.response.body":
            self._page += message.get("body", b"")
            if message.get("more_body"):
                return
            await self._send_page(bytes(self._page))
            return
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


async def _refuse(send: Send, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _redirect(send: Send, to: str) -> None:
    await send({"type": "http.response.start", "status": 303, "headers": [(b"location", to.encode())]})
    await send({"type": "http.response.body", "body": b""})
