#!/usr/bin/env python
"""A hostile reward server against the client: `python scripts/http_faults.py [--requests 10000] [--seed 0]`.

A process of its own plays faults on raw sockets, drawn by a seed, in half of its answers: at the accept, in the status line,
headers, body, chunks and trailers, on kept connections, and with answers that belong to other requests. Many threads score
conversations, some by a format with ids and some by one without, and some ask by the connections to the Hub, which try once.

It fails where a score is wrong, where a call passes its deadline by more than a second, where the client's memory grows by
more than 64 MB, or where a kind of fault was never played. One line of JSON tells what was seen.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "0"  # what is asked is a process of its own

import httpx2  # noqa: E402

from reward import hub_transport  # noqa: E402
from reward.client import RewardClient, RewardRefused, RewardUnavailable  # noqa: E402

TIMEOUT, DEADLINE, GRACE = 0.4, 1.6, 1.0  # seconds of an attempt, of a call of one request, and more than that
MEMORY = 64  # MB
WHOLE = 2**20  # bytes of an answer by the connections to the Hub
THREADS = 16
HEAD = b"HTTP/1.1 200 OK\r\n"
NOTHING = b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def sized(body: bytes, more: bytes = b"") -> bytes:
    return HEAD + more + b"content-length: %d\r\n\r\n" % len(body) + body


class Peer:
    """One connection to the server. `old` are the answers to earlier requests, and `wrong` is one that no request has."""

    def __init__(self, taken: socket.socket, old: list[bytes]) -> None:
        self.socket, self.old = taken, old
        self.right = self.wrong = b""

    def say(self, data: bytes, wait: float = 0.0, more: bytes = b"") -> None:
        """`more` comes `wait` seconds later."""
        self.socket.sendall(data)
        time.sleep(wait)
        self.socket.sendall(more)

    def drip(self, before: bytes, part: bytes, pause: float = 0.05) -> None:
        self.say(before)
        for _ in range(600):
            time.sleep(pause)
            self.say(part)

    def flood(self, before: bytes, part: bytes) -> None:
        self.say(before)
        while True:
            self.say(part)

    def reset(self, data: bytes = b"") -> None:
        self.say(data)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def earlier(self) -> bytes:
        """An answer to an earlier request, of the same form and with its ids."""
        return sized(self.old[-1] if self.old else b'{"scores": [99.0, 99.0], "ids": ["a", "b"]}')


BOMB = gzip.compress(b" " * 2**25)
KEEPS: dict[str, Callable[[Peer], None]] = {
    # the connection may go on after these
    "right": lambda p: p.say(sized(p.right)),
    "right in chunks of a byte": lambda p: p.say(
        CHUNKED + b"".join(b"1\r\n%c\r\n" % c for c in p.right) + b"0\r\nx-sum: 1\r\n\r\n"
    ),
    "right after an interim answer": lambda p: p.say(b"HTTP/1.1 100 Continue\r\n\r\n" + sized(p.right)),
    "right and twice": lambda p: p.say(sized(p.right) * 2),
    "right and a wrong one": lambda p: p.say(sized(p.right) + sized(p.wrong)),
    "right and a wrong one later": lambda p: p.say(sized(p.right), 0.005, sized(p.wrong)),
    "right and an earlier one": lambda p: p.say(sized(p.right) + p.earlier()),
    "right and bytes": lambda p: p.say(sized(p.right) + b"\r\n\0x"),
    "right and a refusal later": lambda p: p.say(sized(p.right), 0.005, NOTHING % b"400 No"),
    "right and too large later": lambda p: p.say(sized(p.right), 0.005, NOTHING % b"413 No"),
    "500": lambda p: p.say(b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nno"),
    "429 and a right one": lambda p: p.say(NOTHING % b"429 Wait" + sized(p.right)),
    "malformed JSON": lambda p: p.say(sized(p.right[:-3])),
    "one score more": lambda p: p.say(sized(p.right.replace(b"[", b"[99.0, ", 1))),
}
ENDS: dict[str, Callable[[Peer], None]] = {
    "close": lambda p: None,
    "reset": lambda p: p.reset(),
    "silence": lambda p: time.sleep(2 * TIMEOUT),
    "no HTTP": lambda p: p.say(b"220 mail.example ESMTP\r\n\r\n"),
    "HTTP/0.9": lambda p: p.say(p.right),
    "status drips": lambda p: p.drip(b"HTTP/1.1 200 O", b"K"),
    "status without end": lambda p: p.flood(b"HTTP/1.1 200 ", b"O" * 65536),
    "interim answers drip": lambda p: p.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "interim answers without end": lambda p: p.flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2000),
    "switches protocols": lambda p: p.say(b"HTTP/1.1 101 Go\r\nupgrade: x\r\n\r\n" + sized(p.right)),
    "a header drips": lambda p: p.drip(HEAD + b"x-a: ", b"a"),
    "headers drip": lambda p: p.drip(HEAD, b"x-a: b\r\n"),
    "headers without end": lambda p: p.flood(HEAD, b"x-a: b\r\n" * 8000),
    "a header without end": lambda p: p.flood(HEAD + b"x-a: ", b"a" * 65536),
    "two lengths": lambda p: p.say(sized(p.right, b"content-length: 3\r\n")),
    "a negative length": lambda p: p.say(HEAD + b"content-length: -5\r\n\r\n" + p.right),
    "a length of terabytes": lambda p: p.flood(HEAD + b"content-length: 9999999999999\r\n\r\n", b"[" * 65536),
    "gzip below chunks": lambda p: p.flood(HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n", BOMB),
    "gzip": lambda p: p.say(sized(BOMB, b"content-encoding: gzip\r\n")),
    "brotli": lambda p: p.flood(HEAD + b"content-encoding: br\r\n\r\n", BOMB),
    "empty blocks of gzip drip": lambda p: p.drip(HEAD + b"content-encoding: gzip\r\n\r\n" + BOMB[:10], b"\0\0\0\xff\xff"),
    "a body drips": lambda p: p.drip(HEAD + b"content-length: 9999\r\n\r\n", b" "),
    "a body in two, then silence": lambda p: p.say(sized(p.right)[:-5], 2 * TIMEOUT),
    "half a body": lambda p: p.say(sized(p.right)[:-5]),
    "half a body, reset": lambda p: p.reset(sized(p.right)[:-5]),
    "a body without end": lambda p: p.flood(HEAD + b"\r\n", b"[[[[" * 16384),
    "millions of scores": lambda p: p.say(sized(b'{"scores": [' + b"1," * 2**21 + b"1]}")),
    "a chunk's size drips": lambda p: p.drip(CHUNKED, b"0"),
    "a chunk's extension drips": lambda p: p.drip(CHUNKED + b"5;x=", b"x"),
    "a chunk's extension without end": lambda p: p.flood(CHUNKED + b"5;x=", b"x" * 65536),
    "a chunk of no size": lambda p: p.say(CHUNKED + b"zz\r\n" + p.right),
    "a chunk longer than it says": lambda p: p.say(CHUNKED + b"5\r\n" + p.right + b"\r\n0\r\n\r\n"),
    "chunks without end": lambda p: p.flood(CHUNKED, b"4000\r\n" + b" " * 0x4000 + b"\r\n"),
    "chunks of a byte without end": lambda p: p.flood(CHUNKED, b"1\r\n \r\n" * 10000),
    "trailers drip": lambda p: p.drip(CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(p.right), p.right), b"x: y\r\n"),
    "trailers without end": lambda p: p.flood(CHUNKED + b"%x\r\n%b\r\n0\r\n" % (len(p.right), p.right), b"x: y\r\n" * 9999),
}  # fmt: skip
BEFORE = "an answer before the request"
EARLY = ("an earlier answer instead", "half a request is read")
ALL = [*KEEPS, *ENDS, *EARLY]


class Server:
    """Serves for ever, and prints the counts of what it played once its input ends."""

    def __init__(self, seed: int) -> None:
        self.seed, self.numbers, self.connections = seed, itertools.count(), itertools.count()
        self.played: Counter[str] = Counter()

    def run(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        print(listener.getsockname()[1], flush=True)
        sys.stdin.read()
        print(json.dumps(self.played), flush=True)

    def accept(self, listener: socket.socket) -> None:
        while True:
            taken, _ = listener.accept()
            taken.settimeout(5)
            threading.Thread(target=self.serve, args=(taken,), daemon=True).start()

    def serve(self, taken: socket.socket) -> None:
        peer = Peer(taken, [])
        try:
            with taken:
                if next(self.connections) % len(ALL) == 7:
                    self.played[BEFORE] += 1
                    peer.say(peer.earlier())
                while self.one(peer):
                    pass
        except (OSError, ValueError):
            pass  # the client has gone

    def kind(self, number: int) -> str:
        """What the answer of that number is: each second one is a fault, and each kind comes once in a lap."""
        lap, place = divmod(number // 2, len(ALL))
        return random.Random(f"{self.seed} {lap}").sample(ALL, len(ALL))[place] if number % 2 else "right"

    def one(self, peer: Peer) -> bool:
        """Play one answer; whether the connection goes on."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (more := peer.socket.recv(65536)):
                return False
            data += more
        kind = self.kind(next(self.numbers))
        self.played[kind] += 1
        if kind == "half a request is read":
            peer.say(peer.earlier())
            return False
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
        while len(body) < length:
            body += peer.socket.recv(65536)
        asked = json.loads(body)
        ids = [i["id"] for i in asked["items"]] if "items" in asked else None
        texts = [i["response"] for i in asked["items"]] if ids else asked["query"]
        scores = [int(text.split()[-1]) / 2 for text in texts]
        form = {"scores": scores, "ids": ids} if ids else {"rewards": scores}
        peer.right = json.dumps(form).encode()
        wrong = {"scores": [99.0] * len(scores)} if ids else {"rewards": [99.0] * len(scores)}
        peer.wrong = json.dumps(wrong).encode()
        if kind == "an earlier answer instead":
            peer.say(peer.earlier())
            return True
        peer.old.append(peer.right)
        (KEEPS.get(kind) or ENDS[kind])(peer)
        return kind in KEEPS


class Hub:
    """Asks the same by the connections to the Hub."""

    def __init__(self, url: str) -> None:
        self._url, self._client = f"{url}/api/score", hub_transport.client()

    def score(self, items: list[tuple[list[dict[str, str]], str]]) -> list[float]:
        ids = [text for _, text in items]
        body = {"items": [{"id": text, "response": text} for text in ids]}
        try:
            answer = self._client.post(self._url, json=body, timeout=DEADLINE).raise_for_status().json()
        except (httpx2.HTTPError, ValueError) as error:
            raise RewardUnavailable(str(error)) from error
        if answer.get("ids") != ids or len(answer["scores"]) != len(ids):
            raise RewardUnavailable("an answer to another request")
        return list(answer["scores"])


def memory(field: str) -> float:
    """MB of this process: VmRSS now, or VmHWM at its highest."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def attack(requests: int, seed: int) -> dict[str, object]:
    """What became of that many requests, without those that were repeated."""
    wrong: list[str] = []
    late: list[float] = []
    seen: Counter[str] = Counter()
    numbers, lock = itertools.count(), threading.Lock()
    argv = [sys.executable, __file__, "--serve", "--seed", str(seed)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        clients: list[RewardClient | Hub] = [
            RewardClient(
                url,
                dialect=d,
                concurrency=THREADS,
                timeout=TIMEOUT,
                deadline=DEADLINE,
                first_wait=0.0,
                longest_wait=0.0,
            )
            for d in ("selfplay", "openrlhf")
        ]
        clients.append(Hub(url))
        hub_transport.WHOLE = WHOLE

        def work() -> None:
            while (n := next(numbers)) < requests:
                items = [([{"role": "user", "content": "q"}], f"answer {2 * n + k + 200}") for k in (0, 1)]
                began = time.monotonic()
                try:
                    scores = clients[n % 3].score(items)
                    what = "scored"
                    if any(s != (2 * n + k + 200) / 2 for k, s in enumerate(scores)):
                        wrong.append(f"{n}: {scores}")
                except RewardUnavailable:
                    what = "an outage"
                except RewardRefused as error:  # the answer to another request
                    what = "refused"
                    wrong.append(f"{n}: {error}")
                took = time.monotonic() - began
                with lock:
                    seen[what] += 1
                    if took > DEADLINE + GRACE:
                        late.append(round(took, 2))

        before = memory("VmRSS")
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown = memory("VmHWM") - before
        played = json.loads(server.communicate("")[0])
    return {
        "requests": requests,
        "answers": sum(played.values()),
        "seen": dict(seen),
        "wrong": wrong[:5],
        "late": late[:5],
        "MB more": round(grown, 1),
        "never played": [kind for kind in [BEFORE, *ALL] if kind not in played],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="be the server")
    args = parser.parse_args()
    if args.serve:
        Server(args.seed).run()
        return 0
    found = attack(args.requests, args.seed)
    print(json.dumps(found))
    return int(bool(found["wrong"] or found["late"] or found["never played"] or float(str(found["MB more"])) > MEMORY))


if __name__ == "__main__":
    sys.exit(main())
