"""The web application of the reward server: `/score`, `/get_reward`, `/healthz`, `/metrics`.

Requests wait, in order, for a free scorer; there is one for each device. Requests are never merged, so an item's batch, and
with it the last bits of its score, depends on its own request alone. Past a number of waiting requests the answer is 429
with Retry-After: a queue without an end would only hide from the askers that they are too many.
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

SMALL = 1 << 20  # bytes of a body in which there cannot be too many values
VALUES = 128  # of JSON, and keys, for each item that a request may have
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
LONGEST_WISH = 30  # seconds of Retry-After


class Refusal(Exception):
    """A request that is answered with an HTTP status and a reason instead of scores."""

    def __init__(self, status: int, why: str, retry_after: int | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.retry_after = status, why, retry_after


class Desk:
    """Where requests wait for a scorer; `places`: how many may wait beside those that are being scored."""

    def __init__(self, scorers: Sequence[Scorer], places: int) -> None:
        self.inside = 0
        """Requests that wait or are scored."""
        self._scorers, self._places = scorers, places
        self._free: asyncio.Queue[Scorer] = asyncio.Queue()
        for scorer in scorers:
            self._free.put_nowait(scorer)
        self._threads = ThreadPoolExecutor(max_workers=len(scorers), thread_name_prefix="score")
        self._usual = 1.0  # seconds a request, a running mean

    def require_place(self) -> None:
        """Raises Refusal (429) when all places are taken."""
        if self.inside >= len(self._scorers) + self._places:
            seconds = self.inside * self._usual / len(self._scorers) / 2  # by then half of them will have left
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
                raise Refusal(499, "the asker has gone")  # it will ask again: do not work twice
            return await asyncio.get_running_loop().run_in_executor(self._threads, scorer.score, items)
        except (Refusal, Stopped):
            raise
        except RewardUnavailable as error:
            raise Refusal(503, f"what this server asks itself has failed: {error}") from error
        except RewardRefused as error:  # such as a wrong key: no use in asking again
            raise Refusal(424, f"what this server asks itself refuses: {error}") from error
        except Exception as error:
            # one boundary for whatever a model may raise, out of memory above all: this request fails, the server stays
            log.exception("scoring %d items failed", len(items))
            raise Refusal(500, f"scoring failed: {type(error).__name__}: {str(error)[:300]}") from error
        finally:
            self._usual += 0.2 * (time.monotonic() - began - self._usual)
            self._free.put_nowait(scorer)


def values(body: bytes, most: int) -> int:
    """How many keys and values JSON holds, about; where there are more than `most`, that there are more.

    Three bytes of it (`[],`) would become an object of 64.
    """
    plain, strings = STRING.subn(b"", body, count=most + 1)
    return strings + plain.count(b",") + plain.count(b"[") + plain.count(b"{")


def build_app(
    scorers: Sequence[Scorer], *, max_body: int, max_items: int, max_waiting: int, unrender: Unrender
) -> FastAPI:
    """The web application around scorers of the same reward. `max_body` in bytes, `max_waiting` in requests."""
    app = FastAPI(title="reward", docs_url=None, redoc_url=None)
    health = scorers[0].health
    desk = Desk(scorers, max_waiting)
    metrics = Metrics(scorers, inside=lambda: desk.inside)

    def answer(status: int, body: object, headers: dict[str, str] | None = None) -> Response:
        # ASCII: what came in as a lone surrogate can go out again
        content = json.dumps(body, allow_nan=False)
        return Response(content, status_code=status, media_type="application/json", headers=headers)

    async def read(request: Request, form: type[Form]) -> Form:
        """The request's body. Raises Refusal."""
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
            # json.loads and not pydantic's parser: that one refuses a whole request for one lone surrogate
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
            desk.require_place()  # before its body is read; only a whole one takes a place
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
