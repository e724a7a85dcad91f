"""The login form of the page: takes the token once and gives a cookie for it."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from selfplay.web.access import SESSION_SECONDS, Sessions

logger = logging.getLogger(__name__)

WRONG_SECONDS = 0.5  # that a wrong token waits for its answer
FORM = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>selfplay · log in</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { display: grid; place-items: center; min-height: 90vh; margin: 0; }
form { display: grid; gap: .75rem; width: min(22rem, 86vw); }
h1 { font-size: 1.25rem; margin: 0; }
input, button { font: inherit; padding: .5rem .7rem; border-radius: 6px; border: 1px solid #8a94a3; }
button { background: #2563c9; border-color: #2563c9; color: #fff; cursor: pointer; }
p { margin: 0; }
.wrong { color: #c9363a; }
.soft { color: #7d8590; font-size: .875rem; }
</style>
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


def routes(sessions: Sessions | None) -> APIRouter:
    """`/login` and `/logout`; without a token both lead to the page."""
    router = APIRouter(include_in_schema=False)

    @router.get("/login")
    def form() -> Response:
        return RedirectResponse("/", 303) if sessions is None else HTMLResponse(FORM.replace("WRONG", ""))

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        if sessions is None:
            return RedirectResponse("/", 303)
        body = (await request.body()).decode("utf-8", "replace")
        given = parse_qs(body, max_num_fields=4, errors="replace").get("token", [""])[0]
        if not sessions.is_token(given.strip()):
            logger.warning("a wrong token at the login, from %s", request.client.host if request.client else "?")
            await asyncio.sleep(WRONG_SECONDS)
            return HTMLResponse(FORM.replace("WRONG", "That is not the token."), 403)
        response = RedirectResponse("/", 303)
        response.set_cookie(
            sessions.cookie, sessions.new(), max_age=SESSION_SECONDS, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response

    @router.post("/logout")
    def log_out() -> Response:
        response = RedirectResponse("/login", 303)
        if sessions is not None:
            response.delete_cookie(sessions.cookie, httponly=True, samesite="strict")
        return response

    return router
