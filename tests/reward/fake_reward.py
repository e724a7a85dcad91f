"""A reward server that answers as scripted, wrongly too."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


ITEMS = [([{"role": "user", "content": f"question {i}"}], f"answer {i}") for i in range(10)]


QUICK: dict[str, Any] = {"timeout": 30.0, "deadline": 30.0, "first_wait": 0.01, "longest_wait": 0.05, "batch_size": 4}


def score_of(item: dict[str, Any]) -> float:
    """What the fake servers give: the number in the response, halved."""
    return int(item["response"].split()[-1]) / 2


EXPECTED = [i / 2 for i in range(10)]


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"content_length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def right(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    scores = [score_of(item) for item in asked["items"]]
    send(handler, 200, json.dumps({"scores": scores, "ids": [item["id"] for item in asked["items"]]}).encode())


def changed(**change: Callable[[list[Any]], Any]) -> Answer:
    """The right answer, with fields changed."""

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        given = {"scores": [score_of(i) for i in asked["items"]], "ids": [i["id"] for i in asked["items"]]}
        for field, function in change.items():
            given[field] = function(given[field])
        send(handler, 200, json.dumps(given).encode())

    return answer


def status(code: int, content: bytes = b"no", **headers: str) -> Answer:
    return lambda handler, asked: send(handler, code, content, **headers)


def slow(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    time.sleep(2)


def dripping(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(30):
        handler.wfile.write(b" ")
        time.sleep(0.1)


def half(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    send(handler, 200, b'{"scores": [0.0, 0.5', content_length="5000")
    handler.close_connection = True


def reset(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    handler.close_connection = True


FAULTS: dict[str, Answer] = {
    "HTTP 500": status(500),
    "HTTP 503": status(503),
    "HTTP 429": status(429, retry_after="0"),
    "slow": slow,
    "dripping": dripping,
    "half a body": half,
    "reset": reset,
    "malformed JSON": status(200, b'{"scores": [0.0, '),
    "not JSON": status(200, b"<html>welcome</html>"),
    "another form": status(200, b'{"rewards": [1.0]}'),
    "texts": changed(scores=lambda s: [str(x) for x in s]),
    "booleans": changed(scores=lambda s: [True for _ in s]),
    "one too few": changed(scores=lambda s: s[:-1]),
    "one too many": changed(scores=lambda s: [*s, 0.0]),
    "none at all": changed(scores=lambda s: []),
    "another order": changed(scores=lambda s: s[::-1], ids=lambda ids: ids[::-1]),
    "other items": changed(ids=lambda ids: [f"x{i}" for i in ids]),
}


class FakeServer(ThreadingHTTPServer):
    """Answers with the scripted answers in turn, then with `default` for ever; notes what it was asked."""

    daemon_threads = True
    request_queue_size = 64  # with the usual 5 a connection of many at once may wait a second to be tried again

    def __init__(self, *script: Answer, default: Answer = right, port: int = 0) -> None:
        self.script, self.default = list(script), default
        self.asked: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.weights, self.health_status, self.kind = "one", 200, "model"  # what /healthz says
        self.connections: set[tuple[str, int]] = set()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is expected here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.asked.append(asked | {"path": self.path})
            answer = self.server.script.pop(0) if self.server.script else self.server.default
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            self.server.connections.add(self.client_address)
        try:
            answer(self, asked)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def do_GET(self) -> None:
        health = {
            "kind": self.server.kind,
            "model": "m",
            "parameters": 0,
            "dtype": "none",
            "device": "cpu",
            "max_tokens": 9,
            "files": {},
        }
        named = {"weights_sha256": self.server.weights, "template_sha256": "t"}
        send(self, self.server.health_status, json.dumps(health | named).encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def fake(*script: Answer, default: Answer = right, port: int = 0) -> Iterator[FakeServer]:
    with FakeServer(*script, default=default, port=port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
