"""The web application of the reward server: `/score`, `/get_reward`, `/healthz`, `/metrics`.

There is one scorer for each device, and requests wait in order until one is free. Requests are never merged. So the batch
of an item depends on its own request alone, and with it the last bits of its score. Only so many requests may wait: the
next one is answered 429 with Retry-After. A queue without an end would hide from the clients that they ask for too much.
"""

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError

from reward.faults import RewardRefused, RewardUnavailable
from reward.metrics import Metrics
from reward.openrlhf import Unrender
from reward.schema import GetRewardRequest, GetRewardResponse, Item, ScoreRequest, ScoreResponse
from reward.scorer import Score, Scorer, Stopped

log = logging.getLogger("reward.server")
Form = TypeVar("Form", bound=BaseModel)

SMALL = 1 << 20  # bytes; a body of this size cannot hold too many values
VALUES = 128  # keys and values of JSON that a request may have for each of its items
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
LONGEST_WISH = 30  # the most seconds that Retry-After asks for


class Refusal(Exception):
    """A request that is answered with an HTTP status and a reason instead of scores."""

    def __init__(self, status: int, why: str, retry_after: int | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.retry_after = status, why, retry_after


class Desk:
    """Where requests wait for a scorer. `places` is how many may wait beside those that are being scored."""

    def __init__(self, scorers: Sequence[Scorer], places: int) -> None:
        self.inside = 0
        """The number of requests that wait or are being scored."""
        self._scorers, self._places = scorers, places
        self._free: asyncio.Queue[Scorer] = asyncio.Queue()
        for scorer in scorers:
            self._free.put_nowait(scorer)
        self._threads = ThreadPoolExecutor(max_workers=len(scorers), thread_name_prefix="score")
        self._usual = 1.0  # seconds that a request takes, as a running mean

    def require_place(self) -> None:
        """Raises Refusal (429) when all places are taken."""
        if self.inside >= len(self._scorers) + self._places:
            seconds = self.inside * self._usual / len(self._scorers) / 2  # after this time half of them will be done
            wish = min(max(1, math.ceil(seconds)), LONGEST_WISH)
            raise Refusal(429, f"{self.inside} requests are waiting already: ask again later", wish)

    async def score(self, items: Sequence[Item], request: Request) -> list[Score]:
        """Raises Refusal."""
        self.require_place()
        self.inside += 1
        try:
            return await self._score(items, request)
        finally:
            self.inside -= 1

    async def _score(self, items: Sequence[Item], request: Request) -> list[Score]:
        scorer = await self._free.get()
        began = time.monotonic()
        try:
            if await request.is_disconnected():
                raise Refusal(499, "the asker has gone")  # It will ask again, so the work would be done twice.
            return await asyncio.get_running_loop().run_in_executor(self._threads, scorer.score, items)
        except (Refusal, Stopped):
            raise
        except RewardUnavailable as error:
            raise Refusal(503, f"what this server asks itself has failed: {error}") from error
        except RewardRefused as error:  # A wrong key, for instance. Asking again would not help.
            raise Refusal(424, f"what this server asks itself refuses: {error}") from error
        except Exception as error:
            # A model may raise anything, most often because memory is short. This request fails, and the server goes on.
            log.exception("scoring %d items failed", len(items))
            raise Refusal(500, f"scoring failed: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            self._usual += 0.2 * (time.monotonic() - began - self._usual)
            self._free.put_nowait(scorer)


def values(body: bytes, most: int) -> int:
    """About how many keys and values a JSON text holds. Counting ends soon after `most`.

    It is asked before the text is decoded, because three bytes (`[],`) would become an object of 64 bytes.
    """
    plain, strings = STRING.subn(b"", body, count=most + 1)
    return strings + plain.count(b",") + plain.count(b"[") + plain.count(b"{")


def build_app(
    scorers: Sequence[Scorer], *, max_body: int, max_items: int, max_waiting: int, unrender: Unrender
) -> FastAPI:
    """The web application around scorers of the same reward. `max_body` is in bytes, `max_waiting` in requests."""
    app = FastAPI(title="reward", docs_url=None, redoc_url=None)
    health = scorers[0].health
    desk = Desk(scorers, max_waiting)
    metrics = Metrics(scorers, inside=lambda: desk.inside)

    def answer(status: int, body: object, headers: dict[str, str] | None = None) -> Response:
        # JSON in ASCII can hold a lone surrogate, so whatever came in can go out again.
        content = json.dumps(body, allow_nan=False)
        return Response(content, status_code=status, media_type="application/json", headers=headers)

    async def read(request: Request, form: type[Form]) -> Form:
        """The body of the request. Raises Refusal."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_body:
                raise Refusal(413, f"the body is longer than {max_body} bytes: send fewer items at once")
            chunks.append(chunk)
        body = b"".join(chunks)
        most = VALUES * max(max_items, 4096)
        if len(body) > SMALL and values(body, most) > most:
            raise Refusal(413, "the body holds more values than score requests need: send fewer items at once")
        try:
            # The parser of pydantic would refuse a whole request for one lone surrogate, and json.loads does not.
            return form.model_validate(json.loads(body))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found[:3])
            raise Refusal(422, f"not a score request ({len(found)} errors): {where}") from error
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the body is not JSON: {error}") from error

    async def scored(items: Sequence[Item], request: Request) -> list[Score]:
        if len(items) > max_items:
            raise Refusal(413, f"{len(items)} items, at most {max_items} in one request")
        try:
            scores = await desk.score(items, request)
        except Stopped:
            raise Refusal(503, "the server is going down") from None
        metrics.scored(scores)
        return scores

    async def own(request: Request) -> ScoreResponse:
        asked = await read(request, ScoreRequest)
        scores = await scored(asked.items, request)
        return ScoreResponse(
            scores=[s.value for s in scores],
            errors=[s.reason for s in scores],
            ids=[item.id for item in asked.items],
            weights_sha256=health.weights_sha256,
        )

    async def openrlhf(request: Request) -> GetRewardResponse:
        asked = await read(request, GetRewardRequest)
        try:
            items = unrender.items(asked)
        except ValueError as error:
            raise Refusal(422, str(error)) from error
        scores = iter(await scored([i for i in items if isinstance(i, Item)], request))
        found = [next(scores) if isinstance(i, Item) else Score(reason=i) for i in items]
        return GetRewardResponse(
            rewards=[s.value for s in found],
            errors=[s.reason for s in found],
            weights_sha256=health.weights_sha256,
        )

    @app.post("/score")
    @app.post("/get_reward")
    async def post(request: Request) -> Response:
        began = time.monotonic()
        path, status = request.url.path, 200
        try:
            desk.require_place()  # This is asked before the body is read. A request takes its place when all of it is there.
            given = await (own(request) if path == "/score" else openrlhf(request))
            return answer(200, given.model_dump())
        except Refusal as refusal:
            status = refusal.status
            headers = {"retry-after": str(refusal.retry_after)} if refusal.retry_after else None
            return answer(status, {"error": refusal.why}, headers)
        finally:
            metrics.answered(path, status, time.monotonic() - began)

    @app.get("/healthz")
    async def healthz() -> Response:
        return answer(200, health.model_dump())

    @app.get("/metrics")
    async def show() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    return app
