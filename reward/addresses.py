"""The address of an HTTP service, taken apart once."""

import base64
import functools
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

PORTS = {"http": 80, "https": 443}
KEPT = "!#$%&'()*+,/:;=?@[]~"  # These have a meaning in a path or a query, or belong to an escape.


class InvalidAddress(ValueError):
    """The text is no address of an HTTP service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """`host` is for the resolver, `authority` for the Host header, and `target` is the path with its query."""

    scheme: str
    host: str
    port: int
    authority: str
    target: str
    login: str | None
    """The value of the Authorization header, if the address holds a user and a password."""

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port


@functools.lru_cache
def address(url: str) -> Address:
    """The parts of an address. Raises InvalidAddress. Its text leaves the address out, because that may be a secret."""
    try:
        parts = urlsplit(url)
        scheme, port = parts.scheme, parts.port
        host = parts.hostname or ""
        named = f"[{host}]" if ":" in host else host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError as error:  # The port is no number, a bracket is missing, or the name is too long.
        raise InvalidAddress(f"no address of an HTTP service: {type(error).__name__}") from None
    if scheme not in PORTS or not host or any(c <= " " for c in host) or port == 0:
        raise InvalidAddress("an address of an HTTP service is like http://host:8100")
    login = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login = "Basic " + base64.b64encode(pair.encode()).decode()
    target = quote(parts.path or "/", safe=KEPT) + (f"?{quote(parts.query, safe=KEPT)}" if parts.query else "")
    authority = named if port in (None, PORTS[scheme]) else f"{named}:{port}"
    return Address(
        scheme=scheme,
        host=host if ":" in host else named.strip("[]"),
        port=port or PORTS[scheme],
        authority=authority,
        target=target,
        login=login,
    )
