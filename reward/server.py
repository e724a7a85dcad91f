"""The reward server: `python -m reward.server --model PATH`.

`POST /score` and `GET /healthz`, as in reward/schema.py. One thread scores, one request after the other: requests are
never merged, so an item's batch, and with it the last bits of its score, depends on its own request alone.

When it is ready it prints one line of JSON on stdout, and nothing else ever: everything it has to say goes to stderr.
Exit codes: 0 ended by SIGTERM, 2 it cannot be started like this, 130 interrupted.
"""

import argparse
import ctypes
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # slow imports: --help needs none of them
    from fastapi import FastAPI

    from reward.models import RewardModel

log = logging.getLogger("reward.server")

DRAIN = 8  # a refused body is read to its end, so that the answer arrives, but not beyond this many times the limit
PR_SET_PDEATHSIG = 1


def build_app(model: "RewardModel", *, max_body: int, max_items: int) -> "FastAPI":
    """The web application. `max_body` in bytes."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from fastapi import FastAPI, Request, Response
    from pydantic import ValidationError

    from reward.models import Stopped
    from reward.schema import ScoreRequest, ScoreResponse

    app = FastAPI(title="reward", docs_url=None, redoc_url=None)
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")
    turn = asyncio.Lock()

    def answer(status: int, body: object) -> Response:
        # ASCII: what came in as a lone surrogate can go out again
        return Response(json.dumps(body, allow_nan=False), status_code=status, media_type="application/json")

    def refuse(status: int, why: str) -> Response:
        return answer(status, {"error": why})

    async def read(request: Request) -> bytes | None:
        """The body, or None when it is longer than `max_body`."""
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= max_body:
                chunks.append(chunk)
            elif size > DRAIN * max_body:
                break
        return b"".join(chunks) if size <= max_body else None

    @app.get("/healthz")
    async def healthz() -> Response:
        return answer(200, model.health.model_dump())

    @app.post("/score")
    async def score(request: Request) -> Response:
        body = await read(request)
        if body is None:
            return refuse(413, f"the body is longer than {max_body} bytes: send fewer items at once")
        try:
            # json.loads and not pydantic's parser: that one refuses a whole request for one lone surrogate
            asked = ScoreRequest.model_validate(json.loads(body))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            where = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in found[:3])
            return refuse(422, f"not a score request ({len(found)} errors): {where}")
        except (ValueError, RecursionError) as error:
            return refuse(400, f"the body is not JSON: {error}")
        if len(asked.items) > max_items:
            return refuse(413, f"{len(asked.items)} items, at most {max_items} in one request")
        async with turn:
            if await request.is_disconnected():
                return refuse(499, "the asker has gone")  # it will ask again: do not work twice
            try:
                scores = await asyncio.get_running_loop().run_in_executor(worker, model.score, asked.items)
            except Stopped:
                return refuse(503, "the server is going down")
            except Exception as error:
                # one boundary for whatever a model may raise, out of memory above all: this request fails, the server stays
                log.exception("scoring %d items failed", len(asked.items))
                return refuse(500, f"scoring failed: {type(error).__name__}: {str(error)[:300]}")
        given = ScoreResponse(
            scores=[s.value for s in scores],
            errors=[s.reason for s in scores],
            ids=[item.id for item in asked.items],
            weights_sha256=model.health.weights_sha256,
        )
        return answer(200, given.model_dump())

    return app


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m reward.server", description="Serves a reward model over HTTP.")
    add = options.add_argument
    add(
        "--model",
        required=True,
        help="folder of a sequence classification model with one label, or its name on the Hub",
    )
    add("--host", default="127.0.0.1", help="address to listen on; there is no authentication (default: %(default)s)")
    add("--port", type=int, default=8100, help="0 takes a free one (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 … (default: %(default)s)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the checkpoint's (default)")
    add(
        "--batch-tokens", type=positive, help="most tokens in one forward pass (default: 1024 on a CPU, 16384 on a GPU)"
    )
    add("--max-tokens", type=positive, help="longer conversations get no score (default: the model's own limit)")
    add("--max-items", type=positive, default=4096, help="most items in a request (default: %(default)s)")
    add("--max-body-mib", type=positive, default=32, help="longest request body (default: %(default)s)")
    add("--threads", type=positive, default=1, help="threads of torch on a CPU (default: %(default)s)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model (default: never)")
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    die_with_parent()
    options = parser().parse_args()
    # whatever a library prints goes to stderr: stdout carries one line, `ready`
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, end)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if options.threads == 1 else "true")
    try:
        return serve(options, out)
    except KeyboardInterrupt:
        return 130


def serve(options: argparse.Namespace, out: TextIO) -> int:
    """Serve until a signal ends it; the exit code. `out` gets the line of readiness."""
    try:
        listener = bind(options.host, options.port)
    except (OSError, OverflowError) as error:
        log.error("cannot listen on %s, port %d: %s", options.host, options.port, error)
        return 2
    if not is_loopback(options.host):
        log.warning(
            "listening on %s: anyone who reaches the port can use the model, no one is asked who they are", options.host
        )

    import torch
    import uvicorn
    from transformers.utils import logging as transformers_logging

    from reward.models import ModelRefused, load

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    try:
        model = load(
            options.model,
            dtype=options.dtype,
            device=options.device,
            batch_tokens=options.batch_tokens,
            max_tokens=options.max_tokens,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except ModelRefused as error:
        log.error("%s", " ".join(str(error).split()))  # one line: a supervisor shows the last one
        listener.close()
        return 2
    log.info("serving %s at %s", model.health.model_dump_json(exclude={"files"}), url(listener))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready = {"ready": True, "url": url(listener), "model": options.model}
            print(json.dumps(ready | {"weights_sha256": model.health.weights_sha256}), file=out, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            model.stopping.set()  # the batch that runs now is the last one
            await super().shutdown(sockets)

    config = uvicorn.Config(
        build_app(model, max_body=options.max_body_mib * 2**20, max_items=options.max_items),
        log_config=None,
        access_log=False,
        log_level="warning",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=10,
        limit_concurrency=512,
    )
    Server(config).run(sockets=[listener])
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the model is there a connection is refused, not kept waiting."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def end(_signal: int, _frame: FrameType | None) -> None:
    """SIGTERM while the model loads; uvicorn has its own handler while it serves and calls this one when it is done."""
    raise SystemExit(0)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, where a supervisor wants that."""
    if "SELFPLAY_GUARDED" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit("the parent process ended before this one began")


if __name__ == "__main__":
    sys.exit(main())
