#!/usr/bin/env python
"""Scores under sampling: `python scripts/bench_overlap.py`.

The stages `generate` and `score` of one round of the tiny world, again and again with the same prompts and seeds: one after
the other (apart), and with the reward at work while others are sampled (together). The engine has one core and the reward
the other. A process stands between the two: once it only passes on, and once it slows the reward so that both stages take about
equally long. Nothing is kept in the cache. Wall seconds; each repeat does both ways, in turns. At the end the bound
with PASS or FAIL; exit code 1 where it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from selfplay.rounds.run import Run

BOUND = 1.1  # both stages together, over the longer one alone
SETTINGS = ["reward.cache.entries=0", "evaluate.judge=null", "evaluate.audit_every=0"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--shard-prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--delay", nargs=2, help=argparse.SUPPRESS)  # of the process between: address, seconds an item
    args = parser.parse_args()
    if args.delay:
        serve_slowed(args.delay[0], float(args.delay[1]))
        return 0
    sizes = [f"prompts.per_round={args.prompts}", f"generate.shard_prompts={args.shard_prompts}"]
    sets = [*SETTINGS, *sizes, *args.set]
    worst = bench(args.config, sets, args.repeats)
    print(f"{'PASS' if worst <= BOUND else 'FAIL'}: at most {worst:.3f} × the longer stage, bound {BOUND}")
    return int(worst > BOUND)


def bench(config: str, sets: list[str], repeats: int) -> float:
    """Both measurements, with one engine; the worse ratio."""
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.run import Run

    settings = load(config, sets)
    items = settings.prompts.per_round * settings.generate.candidates
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(process("-m", "reward.server", "--model", str(settings.reward.model), "--port", "0"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        quick = stack.enter_context(process(__file__, "--delay", url, "0"))
        run = stack.enter_context(Run(load(config, [*sets, *asked_at(quick)]), folder / "run", Display()))
        found = measure(run, repeats)
        worst = tell("the reward as it is", found)
        apart = {stage: statistics.median(found[stage]) for stage in ("generate", "score")}
        delay = max(0.0, apart["generate"] - apart["score"]) / items
        slow = stack.enter_context(process(__file__, "--delay", url, str(delay)))
        run.reconfigure(load(config, [*sets, *asked_at(slow)]))
        return max(worst, tell(f"slowed by {1000 * delay:.2f} ms an item", measure(run, repeats)))


def asked_at(url: str) -> list[str]:
    """One request in flight, so that a slowed reward takes the delay of each item one after the other."""
    return ["reward.model=null", f"reward.url={json.dumps([url])}", "reward.concurrency=1"]


def measure(run: Run, repeats: int) -> dict[str, list[float]]:
    """Seconds of `generate`, of `score`, and of both together."""
    from selfplay.rounds.round import begin
    from selfplay.rounds.stages import GENERATE, PROMPTS, SCORE

    found: dict[str, list[float]] = {"generate": [], "score": [], "together": []}
    steps = begin(run)
    early = steps.rewarding.begin_early
    steps.frame.do(PROMPTS, steps.prompts)
    run.draws.record(steps.index)
    for repeat in range(2 * repeats + 2):
        for stale in [*steps.frame.dir.glob("*.shards"), *(steps.frame.path(n) for n in ("generate", "score"))]:
            shutil.rmtree(stale, ignore_errors=True)
        together = repeat % 2 == 1
        steps.rewarding.begin_early = early if together else lambda before: None  # type: ignore[method-assign]
        took = []
        for stage, work in ((GENERATE, steps.generate), (SCORE, steps.score)):
            began = time.monotonic()
            steps.frame.do(stage, work)
            took.append(time.monotonic() - began)
        if repeat < 2:
            continue  # the engine's start, and the first requests
        if together:
            found["together"].append(sum(took))
        else:
            found["generate"].append(took[0])
            found["score"].append(took[1])
    return found


def tell(name: str, found: dict[str, list[float]]) -> float:
    """Print medians and ranges; the ratio to the longer stage."""
    for what, seconds in found.items():
        print(f"{name}: {what} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    longer = max(statistics.median(found[stage]) for stage in ("generate", "score"))
    ratio = statistics.median(found["together"]) / longer
    print(f"{name}: together / longer = {ratio:.3f}", flush=True)
    return ratio


@contextmanager
def process(*arguments: str) -> Iterator[str]:
    """The address of a server that is a process of its own."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def serve_slowed(url: str, delay: float) -> None:
    """Pass requests on to a reward server, and their answers back after `delay` seconds for each item."""

    client = httpx.Client(base_url=url, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        wbufsize = -1  # head and body in one packet

        def do_GET(self) -> None:
            self.answer(client.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer = client.post(self.path, content=body, headers={"content-type": "application/json"})
            time.sleep(delay * len(json.loads(body)["items"]))
            self.answer(answer)

        def answer(self, given: httpx.Response) -> None:
            self.send_response(given.status_code)
            self.send_header("content-length", str(len(given.content)))
            self.end_headers()
            self.wfile.write(given.content)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}"}), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
