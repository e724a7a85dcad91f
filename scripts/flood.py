#!/usr/bin/env python
"""Clients without a token that say nothing, drip or never end: do rounds go on, does memory stay, is `/healthz` answered?

    python scripts/flood.py [--clients 1000] [--rounds 3] [--only reward] [--out runs/flood]

Against `selfplay serve` on the miniature of the tiny world, and against a reward server of its own that scores. Each does its
work (a round; a number of answers) in turn alone and under a flood. The flood is so many idle clients, as many slow ones (half
of them drip headers, half a body), and as many endless ones (half send headers, half a body), all at once. A slow client sends a
piece every two seconds, an endless one 16 KiB every second. Whoever is closed comes back after ten seconds. The flood has
the lowest priority of the machine, since attackers would have machines of their own.

PASS (exit code 0): the work takes at most 1.1 times as long (median of two turns next to each other), the server spends at most 100 µs of
processor time on a client in a second, it grows by at most 50 MB, `/healthz` is answered within 1 s each time, and no traceback
is in a log. On cores that others use too, the processor time of the server and of its children says what the wall clock cannot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from reward.http import HttpError, ask  # noqa: E402
from reward.serving import descriptors  # noqa: E402

MOST_TIMES, MOST_MB, MOST_SECONDS = 1.1, 50.0, 1.0  # work under the flood, growth, /healthz
MOST_MICROSECONDS = 100.0  # of processor time of the server, for a client of the flood in a second
DRIP, PACE = 2.0, 1.0  # seconds between two pieces of a slow client, and between two blocks of an endless one
AGAIN = 10.0  # seconds until a client that was closed comes back
BLOCK = 16 << 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000, help="of each of the three kinds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns alone, and as many under the flood")
    parser.add_argument("--only", choices=["reward", "service"], help="one of the two servers")
    parser.add_argument("--out", type=Path, default=Path("runs/flood"))
    parser.add_argument("--attack", nargs=2, metavar=("HOST:PORT", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.attack:
        os.nice(19)
        host, _, port = args.attack[0].rpartition(":")
        asyncio.run(flood(host, int(port), args.attack[1], args.clients))
        return 0
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    servers = {"reward": against_reward, "service": against_service}
    named = [args.only] if args.only else [*servers]
    failed = [fault for name in named for fault in servers[name](args.out, args.clients, args.rounds)]
    print("FAIL: " + "; ".join(failed) if failed else "PASS")
    return int(bool(failed))


# the clients


async def flood(host: str, port: int, path: str, clients: int) -> None:
    """All clients, until SIGTERM; then says how often they connected and what they sent."""
    descriptors.raise_limit()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n".encode()
    chunk = b"%x\r\n%b\r\n" % (BLOCK, b"a" * BLOCK)
    kinds: list[tuple[str, bytes, bytes, float]] = [
        ("idle", b"", b"", DRIP),
        ("slow headers", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"x: y\r\n", DRIP),
        ("slow bodies", head + b"Content-Length: 4000\r\n\r\n", b"a", DRIP),
        ("endless headers", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"x: " + b"a" * (BLOCK - 5) + b"\r\n", PACE),
        ("endless bodies", head + b"Transfer-Encoding: chunked\r\n\r\n", chunk, PACE),
    ]
    counts: Counter[str] = Counter()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    each = [
        asyncio.create_task(client(host, port, counts, *kind))
        for number, kind in enumerate(kinds)
        for _ in range(clients if number == 0 else clients // 2)
    ]
    await ended.wait()
    for task in each:
        task.cancel()
    print(json.dumps(counts), flush=True)


async def client(
    host: str, port: int, counts: Counter[str], kind: str, first: bytes, more: bytes, pause: float
) -> None:
    rng = random.Random()
    while True:
        with contextlib.suppress(OSError):
            hears, says = await asyncio.open_connection(host, port)
            counts[f"{kind}: connections"] += 1
            try:
                said = first
                while True:
                    says.write(said)
                    counts["bytes"] += len(said)
                    await says.drain()
                    with contextlib.suppress(TimeoutError):
                        if not await asyncio.wait_for(hears.read(1 << 16), pause * rng.uniform(0.9, 1.1)):
                            break
                    said = more
            finally:
                says.close()
        await asyncio.sleep(AGAIN * rng.uniform(0.5, 1.5))


@contextlib.contextmanager
def flooded(url: str, path: str, clients: int) -> Iterator[Counter[str]]:
    """While the block runs, a server is flooded; afterwards the counter has what the clients did."""
    argv = [sys.executable, __file__, "--clients", str(clients), "--attack", url.removeprefix("http://"), path]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    done: Counter[str] = Counter()
    try:
        yield done
    finally:
        process.terminate()
        done.update(json.loads(process.communicate(timeout=60)[0] or "{}"))


class Watch:
    """Asks a server for `/healthz` over a new connection five times a second, and looks at the memory of its process."""

    def __init__(self, url: str, pid: int) -> None:
        self.answers: list[float] = []
        """Seconds that each took; 60 for one that did not come."""
        self.most_mb = 0.0
        self._url, self._pid, self._stop = url, pid, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            began = time.monotonic()
            try:
                well = ask("GET", f"{self._url}/healthz", seconds=60, limit=1 << 16).success
            except HttpError:
                well = False
            self.answers.append(time.monotonic() - began if well else 60.0)
            self.most_mb = max(self.most_mb, resident(self._pid))


def spent(pid: int) -> tuple[float, float]:
    """Seconds of processor time of a process, and of all below it, those that have ended too."""
    tick, rows = os.sysconf("SC_CLK_TCK"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            rows[int(folder.name)] = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    own, ended = (sum(map(int, rows[pid][first : first + 2])) / tick for first in (11, 13))
    below, found = {pid}, ended
    while below := {each for each, row in rows.items() if int(row[1]) in below}:
        found += sum(sum(map(int, rows[each][11:15])) for each in below) / tick
    return own, found


def resident(pid: int) -> float:
    """MB of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


# the servers


def compare(
    name: str, url: str, pid: int, path: str, clients: int, turns: int, work: Callable[[], float], log: Path
) -> list[str]:
    """Do the work alone and under the flood, in turn, and print what was seen; returns what is not as it should be."""
    alone: list[float] = []
    under: list[float] = []
    calm_mb = flood_mb = 0.0
    answers: list[float] = []
    did: Counter[str] = Counter()
    cores: dict[str, list[float]] = {"alone": [], "under": []}  # that the server itself uses
    children: dict[str, list[float]] = {"alone": [], "under": []}  # seconds of processor time below it

    def turn(kind: str) -> float:
        began, before = time.monotonic(), spent(pid)
        seconds = work()
        after = spent(pid)
        cores[kind].append((after[0] - before[0]) / (time.monotonic() - began))
        children[kind].append(after[1] - before[1])
        return seconds

    work()  # warms up
    for _ in range(turns):
        with Watch(url, pid) as watch:
            alone.append(turn("alone"))
        calm_mb = max(calm_mb, watch.most_mb)
        with Watch(url, pid) as watch, flooded(url, path, clients) as done:
            time.sleep(3.0)  # all are there
            under.append(turn("under"))
        flood_mb = max(flood_mb, watch.most_mb)
        answers += watch.answers
        did += done
        time.sleep(2.0)
    times = statistics.median(with_it / without for with_it, without in zip(under, alone, strict=True))
    seconds = ("/".join(f"{s:.1f}" for s in found) for found in (alone, under))
    print(f"{name}: {did.total() - did['bytes']:,} connections, {did['bytes'] / 1e6:,.0f} MB sent to it; {dict(did)}")
    print("| work alone (s) | under the flood (s) | times | memory (MB) | grew by (MB) | /healthz asked | worst (s) |")
    print("|---|---|---|---|---|---|---|")
    grew = flood_mb - calm_mb
    print(
        f"| {' | '.join(seconds)} | {times:.2f} | {calm_mb:.0f} | {grew:+.0f} | {len(answers)} | {max(answers):.2f} |"
    )
    more = statistics.median(cores["under"]) - statistics.median(cores["alone"])
    each = more / (3 * clients) * 1e6
    print("| | alone | under the flood |\n|---|---|---|")
    for what, by_kind in (("cores that the server uses", cores), ("CPU seconds of its children", children)):
        print(f"| {what} | {' | '.join('/'.join(f'{s:.2f}' for s in by_kind[kind]) for kind in by_kind)} |")
    print(f"a client costs the server {each:.0f} µs of processor time a second")
    traces = log.read_text(errors="replace").count("Traceback")
    return [
        f"{name}: {what}"
        for what, wrong in (
            (f"its work takes {times:.2f} times as long", times > MOST_TIMES),
            (f"a client costs {each:.0f} µs of processor time a second", each > MOST_MICROSECONDS),
            (f"it grew by {grew:.0f} MB", grew > MOST_MB),
            (f"/healthz took {max(answers):.2f} s", max(answers) > MOST_SECONDS),
            (f"{traces} tracebacks in {log}", traces > 0),
        )
        if wrong
    ]


@contextlib.contextmanager
def reward_server(*words: str, log: Path) -> Iterator[tuple[str, int]]:
    """A reward server; its address and its process."""
    with log.open("ab") as said:
        argv = [sys.executable, "-m", "reward.server", "--port", "0", *words]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=said, cwd=ROOT)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"], process.pid
    finally:
        process.terminate()
        process.wait(60)


def against_reward(out: Path, clients: int, turns: int) -> list[str]:
    from chaos import world

    from reward.client import RewardClient

    model = next(setting.partition("=")[2] for setting in world() if setting.startswith("reward.model="))
    turn = [{"role": "user", "content": "Which of these numbers is the largest?"}]
    items = [(turn, f"It is {number}, since all others are smaller.") for number in range(6000)]
    log = out / "reward.log"
    with reward_server("--model", model, log=log) as (url, pid), RewardClient(url) as asks:

        def work() -> float:
            began = time.monotonic()
            assert None not in asks.score(items)
            return time.monotonic() - began

        return compare("reward server", url, pid, "/score", clients, turns, work, log)


def against_service(out: Path, clients: int, turns: int) -> list[str]:
    from chaos import SETTINGS, Served, world

    from selfplay.service import orders
    from selfplay.storage.ledger import Store

    os.environ["SELFPLAY_TOKEN"] = "the clients do not know this one"
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    never = ["schedule.mode=interval", "schedule.every_minutes=1000000", f"service.port={port}"]
    served = Served(str(ROOT / "configs" / "tiny.yaml"), [*world(), *SETTINGS, *never], out / "run")
    while served.state() is None or served.state()[0] != "running":
        time.sleep(0.2)
    store = Store(out / "run")

    def ended() -> int:
        if served.process.poll() is not None or served.state()[0] == "paused":
            sys.exit(f"the service is {served.state()}; see {served.log}")
        return sum(row["ended"] is not None for row in store.rounds())

    def work() -> float:
        """A round; the first one has begun by itself."""
        before = ended()
        if store.unfinished() is None and before:
            orders.submit(store, "run", {}, "flood")
        while ended() == before:
            time.sleep(0.1)
        row = store.rounds()[-1]
        return (datetime.fromisoformat(row["ended"]) - datetime.fromisoformat(row["started"])).total_seconds()

    try:
        url = f"http://127.0.0.1:{port}"
        return compare("service", url, served.process.pid, "/login", clients, turns, work, served.log)
    finally:
        store.close()
        served.stop()


if __name__ == "__main__":
    sys.exit(main())
