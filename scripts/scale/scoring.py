#!/usr/bin/env python
"""What scoring costs the controller: `python scripts/scale/scoring.py [--items 65536]`.

The real scorer, client and cache of scores ask a server that answers at once, over HTTP, shard by shard as the stage
`score` does. Each prompt has eight responses of about 2.3 kB. The server is a process of its own, so its processor time
does not count, and neither does the time in which the items are made.

    new    every item is asked for, and its score is kept
    known  the same items again: every score is in the cache

`cpu` is processor seconds of this process in all its threads. `grown_mb` is how far the peak of its resident memory rose
above what it was before the first item.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

from selfplay.config import RewardSource  # noqa: E402
from selfplay.rewards.cache import ScoreCache  # noqa: E402
from selfplay.rewards.scorer import Scorer  # noqa: E402
from selfplay.rewards.texts import Item  # noqa: E402
from selfplay.types import Message  # noqa: E402

PER_PROMPT = 8
SHARD = 64 * PER_PROMPT  # items; generate.shard_prompts × generate.candidates by default
PROMPT_WORDS, RESPONSE_WORDS = 150, 380  # about 0.9 and 2.3 kB
WORDS = ["".join(random.Random(i).choices("etaoinshrdlu", k=2 + i % 7)) for i in range(5000)]

SERVER = """
import http.server, json, zlib
WEIGHTS = "a" * 64
HEALTH = {"kind": "model", "model": "fake", "parameters": 1, "dtype": "bfloat16", "device": "cpu", "max_tokens": 10**5,
          "weights_sha256": WEIGHTS, "template_sha256": "b" * 64, "files": {}}

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def say(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.say(HEALTH)

    def do_POST(self):
        items = json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]
        scores = [zlib.crc32(i["response"].encode()) % 100000 / 1e4 - 5 for i in items]
        self.say({"scores": scores, "ids": [i.get("id") for i in items], "weights_sha256": WEIGHTS})

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def measure(items: int) -> dict[str, float]:
    """The figures of the module's docstring for so many items: `new_cpu`, `known_cpu` in seconds, `grown_mb` in MB."""
    with tempfile.TemporaryDirectory() as folder, instant_server() as url:
        cache = ScoreCache(Path(folder) / "scores.sqlite", 1_000_000)
        source = RewardSource(url=[url])
        scorer = Scorer(
            "reward", [source], None, Path(folder), cache=cache, gpus=None, on_event=lambda kind, text: print(text)
        )
        scorer.ask(
            [Item([{"role": "user", "content": "Hello."}], "Hello.")]
        )  # connects, and imports what is imported late
        _forget_peak()
        before = _memory("VmRSS")
        new, known = (_score_all(scorer, items) for _ in range(2))
        grown = _memory("VmHWM") - before
        scorer.stop()
        cache.close()
    return {"new_cpu": new, "known_cpu": known, "grown_mb": grown}


def _score_all(scorer: Scorer, items: int) -> float:
    """Processor seconds of scoring all items."""
    seconds = 0.0
    for start in range(0, items, SHARD):
        shard = _items(start, min(SHARD, items - start))
        began = time.process_time()
        answer = scorer.ask(shard)
        seconds += time.process_time() - began
        assert answer.scores.shape == (1, len(shard)) and not answer.reasons
    return seconds


def _items(start: int, count: int) -> list[Item]:
    """The items from number `start` on: the same ones for the same numbers. Responses to a prompt share its messages."""
    found: list[Item] = []
    for number in range(start, start + count):
        if number % PER_PROMPT == 0 or not found:
            rng = random.Random(number // PER_PROMPT)
            messages: list[Message] = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=PROMPT_WORDS))}]
        found.append(Item(messages, " ".join(random.Random(-1 - number).choices(WORDS, k=RESPONSE_WORDS))))
    return found


@contextmanager
def instant_server() -> Iterator[str]:
    """The address of a reward server that scores nothing: it answers with a checksum of each response."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def _memory(field: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _forget_peak() -> None:
    """Let the kernel count the peak of the resident memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=65_536)
    print(json.dumps({name: round(value, 2) for name, value in measure(parser.parse_args().items).items()}))
