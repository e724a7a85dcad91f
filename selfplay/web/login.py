"""The login form of the page: takes the token once and gives a cookie for it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import logging
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from selfplay.web.sessions import SESSION_SECONDS, Sessions

logger = logging.getLogger(__name__)

WRONG_SECONDS = 0.5  # that a wrong token waits for its answer
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { display: grid; place-items: center; min-height: 90vh; margin: 0; }
form { display: grid; gap: .75rem; width: min(22rem, 86vw); }
h1 { font-size: 1.25rem; margin: 0; }
input, button { font: inherit; padding: .5rem .7rem; border-radius: 6px; border: 1px solid #8a94a3; }
button { background: #2563c9; border-color: #2563c9; color: #fff; cursor: pointer; }
p { margin: 0; }
.wrong { color: #c9363a; }
.soft { color: #7d8590; font-size: .875rem; }
"""
FORM = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>selfplay · log in</title>
<style>{STYLE}</style>
</head>
<body>
<form method="post" action="/login">
<h1>selfplay</h1>
<label for="token">Token of the service</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Log in</button>
<p class="wrong" role="alert">WRONG</p>
<p class="soft">The one in the environment variable or file that <code>service</code> names in the configuration.</p>
</form>
</body>
</html>
"""
# No script runs here, and no style but the one above.
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def routes(sessions: Sessions | None) -> APIRouter:
    """`/login` and `/logout`; without a token both lead to the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/login")
    def form() -> Response:
        return RedirectResponse("/", 303) if sessions is None else _form()

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        if sessions is None:
            return RedirectResponse("/", 303)
        given = _token(request.headers.get("content-type", ""), await request.body())
        host = request.client.host if request.client else ""
        if given is None:
            return _form("That is not the form of this page.", 400)
        if seconds := sessions.attempts.wait(host):
            return _form(f"Too many wrong tokens. Try again in {seconds} seconds.", 429, {"retry-after": str(seconds)})
        if not sessions.is_token(given.strip()):
            sessions.attempts.wrong(host)
            logger.warning("a wrong token at the login, from %s", _shown(host))
            await asyncio.sleep(WRONG_SECONDS)
            return _form("That is not the token.", 403)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            sessions.cookie, sessions.new(), max_age=SESSION_SECONDS, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        response = RedirectResponse("/login", 303)
        if sessions is not None:
            sessions.end(request.headers)
            response.delete_cookie(sessions.cookie, httponly=True, samesite="strict")
        return response

    return router


def _form(wrong: str = "", status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return HTMLResponse(FORM.replace("WRONG", wrong), status, {"content-security-policy": POLICY, **(headers or {})})


def _token(kind: str, body: bytes) -> str | None:
    """The token in what a form sends; None where it is not what the form of this page sends."""
    if kind.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return None
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=4, errors="strict")
    except ValueError:  # more fields, or bytes that are no text
        return None
    tokens = fields.get("token", [])
    return tokens[0] if len(tokens) == 1 else None


def _shown(host: str) -> str:
    """An address for the log. What a proxy says of its client is free text."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "an address that is none"
