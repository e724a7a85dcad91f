"""The HTTP API: reads the run, and leaves orders for it. OpenAPI under `/api/openapi.json`.

Everything is read from the ledger and the artifacts, and from what the service says of itself; nothing here touches the
run in another way than by an order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import anyio
import prometheus_client
from fastapi import Body, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.middleware.gzip import GZipMiddleware

from selfplay.config import Config
from selfplay.errors import InputError
from selfplay.service import orders
from selfplay.storage import paging
from selfplay.storage.ledger import LedgerError
from selfplay.web import api_models as m
from selfplay.web import login
from selfplay.web import metrics as prometheus
from selfplay.web.access import Guard, is_loopback, require_token
from selfplay.web.sessions import Sessions
from selfplay.web.view import TooManyOrders, View

POLL_SECONDS = 1.0  # between two looks for new events
THREADS = 6  # for requests, and as many for the page; `Store` has connections for both
STREAMS = 64  # event streams at a time

Limit = Annotated[int, Query(ge=1, le=200, description="Most rows of the answer.")]
Before = Annotated[int | None, Query(ge=0, le=2**62, description="Only what has a lower number: the next page.")]
Round = Annotated[int, InPath(ge=0, le=2**31 - 1, description="Number of the round.")]
Bound = Annotated[float | None, Query(allow_inf_nan=False)]
Text = Annotated[str | None, Query(max_length=200)]

Found = TypeVar("Found")

ANY: dict[int | str, dict[str, Any]] = {
    status: {"model": m.Problem, "description": what}
    for status, what in {
        401: "A token is needed", 403: "Host or Origin are not the service's own", 422: "Not valid", 503: "The ledger does not answer",
    }.items()
}  # fmt: skip
REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": m.Problem, "description": what}
    for status, what in {
        400: "The body is no JSON", 409: "Can never be obeyed", 413: "The body is too large", 415: "The body is not JSON",
        429: "Too many orders wait",
    }.items()
}  # fmt: skip
ABSENT: dict[int | str, dict[str, Any]] = {404: {"model": m.Problem, "description": "There is no such thing"}}


def create_app(
    run_dir: Path, config: Config, progress: Callable[[], dict[str, Any]], token: str | None, page: bool = True
) -> FastAPI:
    """API and page of a run folder.

    progress: what the service does now (see `View`). token: what `access.read_token` found. Raises ConfigError where
    others could reach the app without a token. An app with the page can be made once in a process.
    """
    require_token(config.service, token)
    view = View(run_dir, config, progress)
    sessions = Sessions(token, config.service) if token else None
    app = FastAPI(
        lifespan=_few_threads,
        title=f"selfplay: {config.run.name}", version=version("selfplay"), docs_url=None, redoc_url=None,
        openapi_url="/api/openapi.json", responses=ANY, separate_input_output_schemas=False,
        description="Reads a self-play run and gives it orders. Lists are paged; times are UTC. A POST needs a JSON body.",
    )  # fmt: skip
    app.state.view, app.state.stopping = view, threading.Event()
    app.include_router(login.routes(sessions))
    _errors(app)
    _probes(app, view)
    _reads(app, view)
    _stream(app, view)
    _orders(app, view)
    if page:
        from selfplay.web.page.app import mount

        mount(app, view, logout=sessions is not None)
    app.add_middleware(Guard, service=config.service, sessions=sessions)
    if not is_loopback(config.service.host):  # on the machine itself compressing takes longer than sending
        app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=5)
    return app


@contextlib.asynccontextmanager
async def _few_threads(_: FastAPI) -> AsyncIterator[None]:
    """Requests wait for a thread rather than for a connection to the ledger, and the process stays small."""
    anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
    with ThreadPoolExecutor(THREADS, thread_name_prefix="page") as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        yield


def _errors(app: FastAPI) -> None:
    """Every refusal is a `Problem`; none shows the inside of the program."""

    @app.exception_handler(InputError)
    def refused(_: Request, error: InputError) -> JSONResponse:
        status = 429 if isinstance(error, TooManyOrders) else 422 if isinstance(error, paging.CursorError) else 409
        return JSONResponse({"detail": str(error), "hint": error.hint}, status)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return JSONResponse({"detail": what[:2000], "hint": ""}, 422)

    @app.exception_handler(LedgerError)
    def locked(_: Request, error: LedgerError) -> JSONResponse:
        return JSONResponse({"detail": "the ledger does not answer", "hint": "try again"}, 503, {"retry-after": "5"})


def _probes(app: FastAPI, view: View) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> m.Health:
        """The process answers. In no thread: those may all wait for the ledger."""
        return m.Health(status="ok")

    @app.get("/readyz", tags=["health"], responses={503: {"model": m.Health, "description": "Not ready"}})
    def readyz(response: Response) -> m.Health:
        """The ledger answers, and the service has come up and not stopped. A paused service is ready: it takes orders."""
        try:
            view.store.created()
        except LedgerError:
            response.status_code = 503
            return m.Health(status="unavailable", detail="the ledger does not answer")
        service = view.service()
        ready = service.state not in ("starting", "stopped")
        response.status_code = 200 if ready else 503
        return m.Health(status="ok" if ready else "unavailable", detail=service.state)

    registry = prometheus.registry(view)

    @app.get("/metrics", tags=["health"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:
        """Prometheus metrics, read from the ledger at each scrape."""
        return Response(prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _pair_filter(
    round: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    kept: Annotated[bool | None, Query(description="Kept or dropped; both where it is not given.")] = None,
    reason: Annotated[str | None, Query(max_length=200, description="Why kept or why dropped.")] = None,
    prompt_id: Text = None,
    explicit_min: Bound = None, explicit_max: Bound = None,
    implicit_min: Bound = None, implicit_max: Bound = None,
    potential_min: Bound = None, potential_max: Bound = None,
) -> paging.PairFilter:  # fmt: skip
    return paging.PairFilter(
        round=round, kept=kept, reason=reason, prompt_id=prompt_id, explicit_margin=(explicit_min, explicit_max),
        implicit_margin=(implicit_min, implicit_max), potential=(potential_min, potential_max),
    )  # fmt: skip


def _reads(app: FastAPI, view: View) -> None:
    @app.get("/api/run", tags=["run"])
    def run() -> m.RunSummary:
        """The run at a glance: what the service does now, and how the rounds went."""
        return view.summary()

    @app.get("/api/rounds", tags=["rounds"])
    def rounds(before: Before = None, limit: Limit = 50) -> list[m.Round]:
        """Rounds, newest first, with the metrics that sum them up."""
        return view.rounds(before, limit)

    @app.get("/api/rounds/{round}", tags=["rounds"], responses=ABSENT)
    def round_(round: Round) -> m.RoundDetail:
        """One round: stages, all metrics, seconds, reasons."""
        return _found(view.round(round), f"there is no round {round}")

    @app.get("/api/rounds/{round}/histogram", tags=["rounds"])
    def histogram(
        round: Round, of: Literal["explicit_margin", "implicit_margin", "potential"] = "potential",
        bins: Annotated[int, Query(ge=1, le=200)] = 30,
    ) -> m.Histogram:  # fmt: skip
        """Base pairs of a round by a margin or by alignment potential; empty where there are none."""
        return view.histogram(round, of, bins)

    @app.get("/api/pairs", tags=["pairs"])
    def pairs(
        where: Annotated[paging.PairFilter, Depends(_pair_filter)],
        sort: paging.Sort = "round",
        descending: bool = True,
        after: Annotated[str | None, Query(max_length=200, description="Cursor: `next` of the page before.")] = None,
        limit: Limit = 50,
    ) -> m.PairPage:
        """Base pairs, filtered and sorted; those without the value that they are sorted by come last.

        Over all rounds one page examines a bounded number of pairs, so it may hold fewer than `limit` before the end.
        """
        return view.pairs(where, sort, descending, after, limit)

    @app.get("/api/pairs/{round}/{row}", tags=["pairs"], responses=ABSENT)
    def pair(round: Round, row: Annotated[int, InPath(ge=0, le=2**31 - 1)]) -> m.PairDetail:
        """One base pair, whole: prompt, both responses, every number that decided on it."""
        return _found(view.pair(round, row), f"there is no pair {row} of round {round}")

    @app.get("/api/prompts", tags=["prompts"])
    def prompts(
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the first one: `next` of the page before.")] = 0,
        limit: Limit = 50,
    ) -> m.PromptPage:  # fmt: skip
        """Prompts of the pool in the order they came, those that joined later last."""
        return view.pool(after, limit)

    @app.get("/api/answers", tags=["policies"])
    def answers(
        before: Before = None,
        columns: Annotated[int, Query(ge=1, le=20, description="Audited rounds beside the initial policy.")] = 3,
        after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Number of the first prompt: `next` of the page before.")] = 0,
        limit: Annotated[int, Query(ge=1, le=50, description="Most prompts of the answer.")] = 10,
    ) -> m.AnswerPage:  # fmt: skip
        """What policies say to the audit prompts: the initial one, and the newest audited rounds (with a lower number than
        `before`). The prompts are the same in every round."""
        return view.answers(before, columns, after, limit)

    @app.get("/api/policies", tags=["policies"])
    def policies(before: Before = None, limit: Limit = 50) -> list[m.PolicyRow]:
        """Policies, newest first."""
        return view.policies(before, limit)

    @app.get("/api/events", tags=["events"])
    def events(
        before: Before = None, kind: Text = None, round: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None, limit: Limit = 50
    ) -> list[m.Event]:  # fmt: skip
        """Events, newest first."""
        return view.events(before, kind, round, limit)

    @app.get("/api/orders", tags=["orders"])
    def orders_(
        before: Before = None, state: Literal["pending", "done", "refused"] | None = None, limit: Limit = 50
    ) -> list[m.OrderRow]:
        """Orders, newest first, with what came of them."""
        return view.orders(before, state, limit)


def _stream(app: FastAPI, view: View) -> None:
    slots = asyncio.Semaphore(STREAMS)

    async def free() -> None:
        if slots.locked():
            raise HTTPException(429, f"{STREAMS} clients follow the events already")

    @app.get(
        "/api/events/stream", tags=["events"], response_class=EventSourceResponse, dependencies=[Depends(free)],
        responses={429: {"model": m.Problem, "description": "Too many streams"}},
    )  # fmt: skip
    async def stream(
        last_event_id: Annotated[str | None, Header(max_length=20, description="Set by a browser that reconnects.")] = None,
        after: Annotated[int | None, Query(ge=0, le=2**62, description="Events with a higher number; by default new ones.")] = None,
    ) -> AsyncIterable[ServerSentEvent]:  # fmt: skip
        """Events as they happen (Server-Sent Events); the id of each is its number, where a reconnection goes on."""
        async with slots:
            last = int(last_event_id) if last_event_id and last_event_id.isdecimal() else after
            if last is None:
                last = await asyncio.to_thread(paging.last_event, view.store)
            while not app.state.stopping.is_set():
                rows: list[dict[str, Any]] = []
                with contextlib.suppress(LedgerError):  # locked for long: the next look finds what this one missed
                    rows = await asyncio.to_thread(paging.events_after, view.store, min(last, 2**62))
                for row in rows:
                    last = row["id"]
                    # In ASCII: FastAPI breaks a message at every character that Python calls a line break, U+2028 too.
                    yield ServerSentEvent(raw_data=json.dumps(row), id=str(last))
                if not rows:
                    await asyncio.sleep(POLL_SECONDS)


def _orders(app: FastAPI, view: View) -> None:
    """One POST for each kind of order; its body holds the arguments."""

    def route(path: str, kind: str, model: type[Any]) -> None:
        def give(body: Any) -> m.OrderGiven:
            return m.OrderGiven(order=view.submit(kind, body.model_dump(mode="json", exclude={"kind"}), "api"))

        give.__annotations__["body"] = Annotated[model, Body()]
        give.__name__ = f"order_{kind}"
        app.post(path, tags=["orders"], status_code=202, responses=REFUSED, summary=kind, description=model.__doc__)(
            give
        )

    for kind, model in orders.KINDS.items():
        route({"add_prompts": "/api/prompts", "reload": "/api/reload"}.get(kind, f"/api/orders/{kind}"), kind, model)


def _found(value: Found | None, otherwise: str) -> Found:
    if value is None:
        raise HTTPException(404, otherwise)
    return value
