"""HTTP services that cannot be reached from a test: any that answers a few paths, the Hub as far as it takes a model, and
servers on raw sockets, which may be broken or hostile."""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    server: Any

    def answer(self, status: int, body: bytes = b"{}") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Paths(Handler):
    def do_GET(self) -> None:
        found = self.server.paths.get(self.path)
        self.answer(200 if found else 404, (found or "{}").encode())


@contextmanager
def answering(paths: Mapping[str, str]) -> Iterator[str]:
    """The address of a service that answers a GET of these paths."""
    with _serving(Paths) as server:
        server.paths = paths
        yield server.url


class Upload(Handler):
    def do_GET(self) -> None:
        if "/tree/" in self.path:
            files = [{"type": "file", "path": p, "oid": _oid(c), "size": len(c)} for p, c in self.server.files.items()]
            self.answer(200, json.dumps(files).encode())
        else:
            self.answer(200, json.dumps({"id": self.server.repo, "sha": "a" * 40}).encode())

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            self.answer(403, b'{"error": "no rights"}')
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.private = asked.get("private") or asked.get("visibility") == "private"
            hub.repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.answer(200, json.dumps({"url": f"{hub.url}/{hub.repo}"}).encode())
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": hub.oid(f["path"])}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            url = f"{hub.url}/{hub.repo}/commit/{'a' * 40}"
            self.answer(200, json.dumps({"success": True, "commitOid": "a" * 40, "commitUrl": url}).encode())
        else:  # the card is looked at: /api/validate-yaml
            self.answer(200, b'{"errors": [], "warnings": []}')


class Hub(ThreadingHTTPServer):
    """What was uploaded, and by whom."""

    url: str
    repo, private, refuses = "", False, False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()

    def oid(self, path: str) -> str | None:
        return _oid(self.files[path]) if path in self.files else None


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    with _serving(Upload, Hub) as server:
        yield server


@contextmanager
def _serving(handler: type[Handler], kind: Any = ThreadingHTTPServer) -> Iterator[Any]:
    with kind(("127.0.0.1", 0), handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _oid(content: bytes) -> str:
    """What git calls a file by."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


Talk = Callable[[socket.socket], None]


@contextmanager
def raw(talk: Talk) -> Iterator[str]:
    """The address `host:port` of a server that talks so on each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(taken: socket.socket) -> None:
            with taken, suppress(OSError):
                taken.settimeout(10)
                talk(taken)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def head(taken: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += taken.recv(65536) or b"\r\n\r\n"
    return data


def answers(*parts: bytes) -> Talk:
    def talk(taken: socket.socket) -> None:
        head(taken)
        for part in parts:
            taken.sendall(part)
            time.sleep(0.02)

    return talk
