"""Who is let in: whoever brings the bearer token, or the cookie of a log-in with it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

from starlette.datastructures import Headers

from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError
from selfplay.web.attempts import Attempts

logger = logging.getLogger(__name__)

SHORTEST_TOKEN = 16  # characters
SESSION_SECONDS = 7 * 24 * 3600
MOST_SESSIONS = 1000  # then the oldest ends


def configured_token(service: ServiceConfig) -> str | None:
    """The bearer token, from its file or the environment; None where there is none.

    Raises ConfigError for a token file that cannot be read, and for a token that could be guessed.
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
    return token or None


class Sessions:
    """The token, and the log-ins with it. They are kept in memory, by their hashes: a restart ends them too.

    `service`: where the token file is named that holds the token. A change of the file ends all sessions at once, and what
    it holds from then on is the token. While it holds none that is valid, nobody is let in.
    """

    def __init__(self, token: str, service: ServiceConfig | None = None) -> None:
        self._service, self._token = service or ServiceConfig(), token
        self._file: Path | None = self._service.token_file
        self._seen = self._stamp()
        self._until: dict[bytes, float] = {}  # when each session ends, by the hash of its cookie; the oldest first
        self.attempts = Attempts()
        # Cookies are shared by all ports of a host: another run there has another token, so another name.
        self.cookie = f"selfplay_{hashlib.sha256(b'selfplay cookie ' + token.encode()).hexdigest()[:8]}"

    def is_token(self, text: str) -> bool:
        self._follow_file()
        return bool(self._token) and hmac.compare_digest(text.encode("utf-8", "replace"), self._token.encode())

    def new(self) -> str:
        """The cookie of a new session."""
        value = secrets.token_urlsafe(32)
        self._until[_hash(value)] = time.time() + SESSION_SECONDS
        if len(self._until) > MOST_SESSIONS:
            self._until.pop(next(iter(self._until)))
        return value

    def end(self, headers: Headers) -> None:
        """Log out: the cookie of a request is worth nothing from now on."""
        self._until.pop(_hash(self._cookie(headers)), None)

    def admits(self, headers: Headers) -> bool:
        """Whether a request carries the token or the cookie of a session."""
        self._follow_file()
        if (given := bearer(headers)) is not None:
            return self.is_token(given)
        return self._until.get(_hash(self._cookie(headers)), 0.0) > time.time()

    def _cookie(self, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return ""
        return found.value if found is not None else ""

    def _follow_file(self) -> None:
        if self._file is None or (stamp := self._stamp()) == self._seen:
            return
        self._seen = stamp
        self._until.clear()
        try:
            self._token = configured_token(self._service) or ""
            logger.warning("the token file has changed: all sessions have ended")
        except ConfigError as error:
            self._token = ""
            logger.error("nobody is let in: %s", error)

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes with the token file; None while there is none."""
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size) if found is not None else None


def bearer(headers: Headers) -> str | None:
    """The token in the header of a request; None where it has none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else None


def _hash(cookie: str) -> bytes:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).digest()
