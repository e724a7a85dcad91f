"""The reward server: `python -m reward.server --kind NAME --settings FILE`, with a kind of reward/kinds.py.

`--model PATH`, `--rules FILE` and `--judge FILE` are short for three of them.

Serves `POST /score` and `GET /healthz` as in reward/schema.py, OpenRLHF's `POST /get_reward`, and `GET /metrics`.

When it is ready it prints one line of JSON on stdout, and never anything else there. Messages go to stderr.
The exit code is 0 after SIGTERM, 2 if it cannot be started like this, and 130 after an interrupt.
"""

import argparse
import ctypes
import gc
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # these imports are slow, and --help needs none of them
    from reward.scorer import Scorer

log = logging.getLogger("reward.server")

PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's mallopt


class Visible(logging.Formatter):
    """Puts � in the place of characters that a terminal obeys or that nobody sees: an error may quote what a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in super().format(record))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m reward.server", description="Serves a reward model over HTTP.")
    what = options.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a sequence classification model, or its name on the Hub")
    what.add_argument("--rules", help="YAML file with a list of rules, or the list itself as JSON")
    what.add_argument("--judge", help="YAML file with the settings of a judge, or the settings themselves as JSON")
    what.add_argument("--kind", help="any kind of reward/kinds.py, or one of your own as module:Class; see --settings")
    add = options.add_argument
    add("--settings", default="{}", help="of --kind: YAML file, or the settings themselves as JSON (default: none)")
    add(
        "--head",
        action="append",
        default=[],
        type=head,
        metavar="NAME[=WEIGHT]",
        help="of a model with several labels, one that counts; may be given again, the score is the weighted sum",
    )
    add("--host", default="127.0.0.1", help="address to listen on; there is no authentication (default: %(default)s)")
    add("--port", type=int, default=8100, help="0 takes a free one (default: %(default)s)")
    add(
        "--device", default="auto", help="auto, cpu, cuda:1; cuda:0,cuda:1 or all: a worker each (default: %(default)s)"
    )
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the checkpoint's (default)")
    add(
        "--batch-tokens", type=positive, help="most tokens in one forward pass (default: 1024 on a CPU, 16384 on a GPU)"
    )
    add("--max-tokens", type=positive, help="longer conversations get no score (default: the model's own limit)")
    add("--max-items", type=positive, default=4096, help="most items in a request (default: %(default)s)")
    add("--max-waiting", type=positive, default=64, help="requests that may wait; then 429 (default: %(default)s)")
    add(
        "--policy",
        help="folder of the policy's tokenizer, whose chat template /get_reward takes off OpenRLHF's queries",
    )
    add(
        "--chat-template-kwargs",
        type=variables,
        metavar="JSON",
        default={},
        help="variables for the chat templates of --model and --policy, such as '{\"enable_thinking\": false}'",
    )
    add(
        "--max-connections",
        type=positive,
        default=256,
        help="at a time; then the one that waits longest goes (default: %(default)s)",
    )
    add(
        "--max-body-mib",
        type=positive,
        default=32,
        help="of a request, and of all that are on their way (default: %(default)s)",
    )
    add("--threads", type=positive, default=1, help="threads of torch on a CPU (default: %(default)s)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model (default: never)")
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def head(text: str) -> tuple[str, float]:
    """`helpfulness=0.65` or `helpfulness`. Raises ValueError."""
    name, equals, weight = text.rpartition("=")
    return (name, float(weight)) if equals else (text, 1.0)


def variables(text: str) -> dict[str, Any]:
    """A JSON object of variables for a chat template. Raises ValueError."""
    from reward.settings import require_variables

    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(text)
    return require_variables(found)


def main() -> int:
    die_with_parent()
    options = parser().parse_args()
    keep_memory()
    # What a library prints goes to stderr, because stdout carries one line only.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    said = logging.StreamHandler(sys.stderr)
    said.setFormatter(Visible("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[said])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, end)
    # torch reads these when a kind imports it
    os.environ.update(OMP_NUM_THREADS=str(options.threads), MKL_NUM_THREADS=str(options.threads))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if options.threads == 1 else "true")
    try:
        return serve(options, out)
    except KeyboardInterrupt:
        return 130


def serve(options: argparse.Namespace, out: TextIO) -> int:
    """Serve until a signal ends it, and return the exit code. `out` gets the line that says it is ready."""
    try:
        listener = bind(options.host, options.port)
    except (OSError, OverflowError) as error:
        log.error("cannot listen on %s, port %d: %s", options.host, options.port, error)
        return 2
    if not is_loopback(options.host):
        log.warning(
            "listening on %s: anyone who reaches the port can use the model, no one is asked who they are", options.host
        )

    import uvicorn

    from reward.app import build_app
    from reward.openrlhf import Unrender
    from reward.scorer import ModelRefused
    from reward.serving import descriptors
    from reward.serving.connections import Bounds, Connections
    from reward.serving.protocol import configure

    gc.disable()  # imports leave no garbage, and to search for it takes a sixth of their time
    try:
        scorers = load(options)
        app = build_app(
            scorers,
            max_body=options.max_body_mib * 2**20,
            max_items=options.max_items,
            max_waiting=options.max_waiting,
            unrender=Unrender(options.policy, options.chat_template_kwargs),
        )
    except (ModelRefused, ValueError) as error:
        log.error("%s", " ".join(str(error).split()))  # in one line, because a supervisor shows the last line
        listener.close()
        return 2
    finally:
        gc.freeze()  # nor do later collections look at it
        gc.enable()
    health = scorers[0].health
    log.info("serving %s at %s with %d workers", health.model_dump_json(exclude={"files"}), url(listener), len(scorers))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready = {"ready": True, "url": url(listener), "model": health.model}
            print(json.dumps(ready | {"weights_sha256": health.weights_sha256}), file=out, flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for scorer in scorers:
                scorer.stopping.set()  # the batch that runs now is the last one
            await super().shutdown(sockets)

    places, backlog = descriptors.share(options.max_connections, descriptors.raise_limit())
    connections = Connections(Bounds(connections=places, body_bytes=options.max_body_mib * 2**20))
    config = configure(
        app, connections, backlog, ws="none", proxy_headers=False, timeout_keep_alive=60, timeout_graceful_shutdown=10
    )
    Server(config).run(sockets=[listener])
    return 0


def load(options: argparse.Namespace) -> Sequence["Scorer"]:
    """What is served; one scorer for each device. Raises ModelRefused and ValueError."""
    from reward import kinds

    if options.kind is not None:
        return kinds.load(options.kind, options.settings).scorers()
    if options.rules is not None:
        return kinds.load("rules", options.rules).scorers()
    if options.judge is not None:
        return kinds.load("judge", options.judge).scorers()
    settings = {name: getattr(options, name) for name in ("model", "dtype", "device", "batch_tokens", "max_tokens")}
    settings |= {n: getattr(options, n) for n in ("revision", "trust_remote_code", "chat_template_kwargs")}
    return kinds.read("model", settings | {"heads": dict(options.head)}).scorers()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Until the model is loaded a connection is refused and does not have to wait."""
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
    """What SIGTERM does while the model loads. While it serves, uvicorn has its own handler, which calls this one at the end."""
    raise SystemExit(0)


def keep_memory() -> None:
    """Make glibc keep freed memory. Otherwise every forward pass on a CPU gets its pages from the kernel anew, which takes a
    fifth of the time of a small model. The process stays as large as its largest batch made it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 2**25)
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_ARENA_MAX, 1)


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, if a supervisor wants that."""
    if "SELFPLAY_GUARDED" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            sys.exit("the parent process ended before this one began")


if __name__ == "__main__":
    sys.exit(main())
