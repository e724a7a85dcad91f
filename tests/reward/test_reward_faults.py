"""Faults of every kind in a fifth of 2,000 requests: each candidate ends with its right score, or set aside."""

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from reward.client import RewardClient

pytestmark = pytest.mark.service

KINDS = ["refused", "reset", "slow", "500", "429", "half", "nan", "count", "order"]


def score_of(item: dict[str, Any]) -> float:
    """What is right: the number in the response, halved."""
    return int(item["response"].split()[-1]) / 2


class FaultyServer:
    """A reward server on raw sockets. A share of its answers, drawn by `rng`, is faulty."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self.rng, self.share = rng, share
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.poisoned: set[str] = set()
        """Responses that were answered with NaN."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        listener.close()
        self.url = f"http://127.0.0.1:{self.port}"

    async def run(self, started: threading.Event, stop: asyncio.Event) -> None:
        await self._listen()
        started.set()
        await stop.wait()
        self.listener.close()

    async def _listen(self) -> None:
        self.listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _refuse(self, seconds: float) -> None:
        """Nothing listens for a while: new connections are refused."""
        if self.listener.is_serving():
            self.listener.close()
            await asyncio.sleep(seconds)
            await self._listen()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:-2])
                asked = json.loads(await reader.readexactly(int(fields["content-length"])))
                if not await self._answer(asked["items"], writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(self, items: list[dict[str, Any]], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        self.requests += 1
        kind = self.rng.choice(KINDS) if self.rng.random() < self.share else "none"
        self.faults[kind] += 1
        scores, ids = [score_of(i) for i in items], [i["id"] for i in items]
        status, extra, cut = "200 OK", "", None
        if kind in ("refused", "reset"):
            if kind == "refused":
                refusal = asyncio.ensure_future(self._refuse(0.02))
                self.refusal = refusal  # or it would be collected while it runs
            # RST instead of FIN
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return False
        if kind == "slow":
            await asyncio.sleep(1.5)
        if kind == "500":
            status = "500 Internal Server Error"
        if kind == "429":
            status, extra = "429 Too Many Requests", "retry-after: 0\r\n"
        if kind == "nan":
            poisoned = self.rng.randrange(len(items))
            scores[poisoned] = float("nan")
            self.poisoned.add(items[poisoned]["response"])
        if kind == "count":
            scores.pop()
        if kind == "order":
            scores.reverse()
            ids.reverse()
        body = json.dumps({"scores": scores, "ids": ids}).encode()
        if kind == "half":
            cut = len(body) // 2
        writer.write(f"HTTP/1.1 {status}\r\n{extra}content-length: {len(body)}\r\n\r\n".encode() + body[:cut])
        await writer.drain()
        return cut is None


@contextmanager
def running(*servers: FaultyServer) -> Iterator[None]:
    stop = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    started = [threading.Event() for _ in servers]

    async def all_of_them() -> None:
        loops.append(asyncio.get_running_loop())
        await asyncio.gather(*(s.run(e, stop) for s, e in zip(servers, started, strict=True)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    assert all(event.wait(10) for event in started)
    try:
        yield
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


@pytest.mark.parametrize("servers", [1, 2])
def test_a_fifth_of_2000_requests_is_faulty_and_no_score_is_wrong(servers: int) -> None:
    rng = random.Random(servers)
    faulty = [FaultyServer(rng, 0.2) for _ in range(servers)]
    items = [([{"role": "user", "content": f"question {n // 2}"}], f"answer {n}") for n in range(1, 4001)]
    done: list[int] = []
    with (
        running(*faulty),
        RewardClient(
            [s.url for s in faulty],
            batch_size=2,
            concurrency=16,
            timeout=1.0,
            deadline=120.0,
            first_wait=0.01,
            longest_wait=0.1,
        ) as client,
    ):
        scores = client.score(items, on_progress=done.append)
        reasons = client.reasons
    faults = sum((s.faults for s in faulty), Counter[str]())
    poisoned = set[str]().union(*(s.poisoned for s in faulty))
    assert sum(s.requests for s in faulty) >= 2000
    assert 0.17 < 1 - faults["none"] / faults.total() < 0.23
    assert min(faults[kind] for kind in KINDS) > 10

    assert len(scores) == len(items)
    wrong = [(n, s) for n, s in enumerate(scores, 1) if s is not None and s != n / 2]
    assert not wrong  # none is 0 by default either: no right score is 0
    aside = {f"answer {n}" for n, s in enumerate(scores, 1) if s is None}
    assert aside <= poisoned
    assert len(aside) > 10
    assert reasons == {"the score is nan": len(aside)}
    assert done == sorted(set(done)) and done[-1] == len(items)  # each candidate once
