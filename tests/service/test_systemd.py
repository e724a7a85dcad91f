"""What systemd hears, on a socket that stands in for its own."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from selfplay.service import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path, monkeypatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"@{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(name.replace("@", "\0"))
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield listening


def test_what_is_said_arrives(manager):
    systemd.tell("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_without_systemd_or_without_its_socket_nothing_happens(monkeypatch, tmp_path):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.tell("READY=1")
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    before = threading.active_count()
    systemd.keep_watchdog("http://127.0.0.1:9")
    assert threading.active_count() == before


def test_the_watchdog_is_fed_while_the_server_answers(manager, monkeypatch):
    health = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(health[0] if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    systemd.keep_watchdog(f"http://127.0.0.1:{server.server_address[1]}")
    assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    health[0] = 500
    time.sleep(0.3)  # what was on its way arrives
    manager.setblocking(False)
    while True:
        try:
            manager.recv(100)
        except BlockingIOError:
            break
    time.sleep(0.5)
    with pytest.raises(BlockingIOError):
        manager.recv(100)
    server.shutdown()
    server.server_close()
