"""The service on a real port: whose word about a client is taken, WebSockets and streams among the bounds, and a flood."""

import contextlib
import logging
import socket
import struct
import sys
import time
from itertools import pairwise

import httpx
import pytest
import websockets.sync.client as sockets
from fastapi import FastAPI, WebSocket
from mini import ROOT
from served_world import Progress, build, config
from websockets.exceptions import InvalidHandshake

from reward.serving import protocol, websocket
from reward.serving.connections import TELL
from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError
from selfplay.storage.ledger import Store
from selfplay.web import login
from selfplay.web.api import create_app
from selfplay.web.server import serve_in_thread

sys.path.insert(0, str(ROOT / "scripts"))
import flood

pytestmark = pytest.mark.service

TOKEN = "correct horse battery staple"


def until(condition):
    deadline = time.monotonic() + 300  # a flood yields to everything else on a busy machine
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    store = build(tmp_path / "run", rounds=2, pairs=4)
    store.close()
    yield tmp_path / "run"
    said = [*caplog.get_records("call"), *caplog.records]
    assert not [record.getMessage() for record in said if record.levelno >= logging.ERROR]


@contextlib.contextmanager
def served(app, **service):
    server, port = serve_in_thread(app, ServiceConfig(port=0, **service))
    try:
        yield f"127.0.0.1:{port}", server.config.http_protocol_class.keywords["connections"]
    finally:
        server.stop()


def test_what_a_proxy_says_of_its_client_is_believed_of_configured_ones_only(run, caplog, monkeypatch):
    monkeypatch.setattr(login, "WRONG_SECONDS", 0)
    said = {"x-forwarded-for": "6.6.6.6, 203.0.113.7", "x-forwarded-proto": "https"}
    for proxies, address, secure in (([], "127.0.0.1", False), (["10.0.0.0/8", "127.0.0.1"], "203.0.113.7", True)):
        caplog.clear()
        settings = config(f"service.proxies={proxies}")
        app = create_app(run, settings, Progress(), TOKEN, page=False)
        with served(app, proxies=proxies) as (at, _):
            wrong = httpx.post(f"http://{at}/login", data={"token": "wrong"}, headers=said)
            right = httpx.post(f"http://{at}/login", data={"token": TOKEN}, headers=said)
        assert wrong.status_code == 403 and f"a wrong token at the login, from {address}" in caplog.text
        assert ("Secure" in right.headers["set-cookie"]) == secure
    with pytest.raises(ConfigError, match="neither an IP address nor a network"):
        config("service.proxies=['my-proxy']")


def echoing():
    app = FastAPI()

    @app.websocket("/echo")
    async def echo(socket: WebSocket):
        await socket.accept()
        async for text in socket.iter_text():
            await socket.send_text(text)

    @app.websocket("/much")
    async def much(socket: WebSocket):
        await socket.accept()
        await socket.send_text("x" * (16 << 20))
        await socket.receive_text()

    app.state.stopping = contextlib.nullcontext()
    app.state.stopping.set = lambda: None
    return app


def test_a_socket_keeps_its_place_until_it_ends_and_some_places_are_left():
    with served(echoing(), connections=32) as (at, connections), contextlib.ExitStack() as stack:
        open_ = [stack.enter_context(sockets.connect(f"ws://{at}/echo")) for _ in range(29)]
        for each in open_:
            each.send("here")
            assert each.recv(60) == "here"
        with pytest.raises(InvalidHandshake, match="503"):
            sockets.connect(f"ws://{at}/echo")
        idle = [stack.enter_context(socket.create_connection(at.split(":"))) for _ in range(50)]
        assert idle and httpx.get(f"http://{at}/healthz").status_code == 404  # asked and answered
        until(lambda: len(connections) <= 32)
        open_[7].send("still here")
        assert open_[7].recv(60) == "still here"
        open_[0].close()
        until(lambda: not connections.full)
        stack.enter_context(sockets.connect(f"ws://{at}/echo"))


def test_a_message_that_nobody_takes_ends_its_socket(monkeypatch):
    monkeypatch.setattr(websocket, "UNREAD_SECONDS", 0.3)
    upgrade = (
        b"GET /much HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with served(echoing()) as (at, connections), socket.create_connection(at.split(":")) as reads_nothing:
        reads_nothing.sendall(upgrade)
        until(lambda: len(connections) == 1)
        until(lambda: len(connections) == 0)


def test_event_streams_that_drop_are_no_errors(run):
    store = Store(run)
    for number in range(300):
        store.event("note", f"{number} " + "x" * 30_000)
    store.close()
    with served(create_app(run, config(), Progress(), None, page=False)) as (at, connections):
        host, port = at.split(":")
        for _ in range(3):
            with socket.create_connection((host, int(port))) as stream:
                stream.sendall(b"GET /api/events/stream?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                stream.recv(1000)
                time.sleep(0.3)  # the server writes until nobody takes more
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: len(connections) == 0)


def test_a_flood_in_small(run, tmp_path, caplog, monkeypatch):
    """scripts/flood.py against service and reward server, without a round and without its bounds in time."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    app = create_app(run, config(), Progress(), TOKEN, page=False)
    with served(app, connections=64) as (at, connections), flood.flooded(f"http://{at}", "/login", 100) as done:
        until(lambda: sum(connections.closed.values()) > 200)
        for _ in range(20):
            assert httpx.get(f"http://{at}/healthz", timeout=60).status_code == 200
            assert len(connections) <= 64
        assert httpx.get(f"http://{at}/api/run", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert done["idle: connections"] >= 100 and done["endless bodies: connections"] >= 50
    told = [r.created for r in caplog.records if "connections closed" in r.getMessage()]
    assert told and all(later - earlier > 0.9 * TELL for earlier, later in pairwise(told))
    log = tmp_path / "reward.log"
    rules = '[{"rule": "length", "max": 100}]'
    with flood.reward_server("--rules", rules, "--max-connections", "64", log=log) as (url, pid):
        before = flood.resident(pid)
        with flood.flooded(url, "/score", 100):
            time.sleep(3)
            messages = [{"role": "user", "content": "?"}]
            for _ in range(20):
                item = {"messages": messages, "response": "a"}
                assert httpx.post(f"{url}/score", json={"items": [item]}, timeout=60).json()["scores"] != [None]
                assert httpx.get(f"{url}/healthz", timeout=60).status_code == 200
        assert flood.resident(pid) - before < 50
    assert "Traceback" not in log.read_text()
