import asyncio
import os
import time

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError
from selfplay.web import access
from selfplay.web.access import Guard, is_loopback, read_token, require_token
from selfplay.web.attempts import ADDRESSES, MOST, SECONDS
from selfplay.web.sessions import MOST_SESSIONS, Sessions

TOKEN = "correct horse battery staple"


@pytest.fixture
def no_token(monkeypatch):
    monkeypatch.delenv("SELFPLAY_TOKEN", raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.9.1"])
def test_loopback_needs_no_token(host, no_token):
    assert is_loopback(host)
    assert read_token(ServiceConfig(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu-box", "", "localhost.example.org"])
def test_an_address_that_others_can_reach_demands_a_token(host, no_token, monkeypatch):
    service = ServiceConfig(host=host)
    with pytest.raises(ConfigError, match="there is no token") as error:
        read_token(service)
    assert "SELFPLAY_TOKEN" in error.value.hint and "127.0.0.1" in error.value.hint
    with pytest.raises(ConfigError):
        require_token(service, None)
    monkeypatch.setenv("SELFPLAY_TOKEN", f" {TOKEN}\n")
    assert read_token(service) == TOKEN


def test_a_token_from_a_file(tmp_path, no_token):
    path = tmp_path / "token"
    service = ServiceConfig(token_file=path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(service)
    for bad, why in (("", "is empty"), ("short", "at least 16"), ("é" * 20, "ASCII"), ("a" * 20 + "\nb", "printable")):
        path.write_text(bad)
        with pytest.raises(ConfigError, match=why) as error:
            read_token(service)
        assert not bad or bad not in str(error.value)
    path.write_text(TOKEN + "\n")
    assert read_token(service) == TOKEN


def cookie(sessions, value):
    return Headers({"cookie": f"{sessions.cookie}={value}"})


def test_a_session_lasts_until_it_expires_or_ends(monkeypatch):
    sessions = Sessions(TOKEN)
    one, other = (cookie(sessions, sessions.new()) for _ in range(2))
    assert sessions.admits(one) and sessions.admits(other)
    for forged in ("", "x", one["cookie"][:-1].partition("=")[2]):
        assert not sessions.admits(cookie(sessions, forged))
    sessions.end(one)
    sessions.end(one)
    assert not sessions.admits(one) and sessions.admits(other)
    for _ in range(MOST_SESSIONS):
        newest = sessions.new()
    assert not sessions.admits(other) and sessions.admits(cookie(sessions, newest))
    later = time.time() + 7 * 24 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert not sessions.admits(cookie(sessions, newest))


def test_a_changed_token_ends_the_sessions_with_the_old_one(tmp_path, no_token, caplog):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    service = ServiceConfig(token_file=path)
    sessions = Sessions(read_token(service), service)
    guarded = client(app(sessions))
    old = sessions.new()
    guarded.headers["cookie"] = f"{sessions.cookie}={old}"
    assert guarded.get("/x").status_code == 200
    with guarded.websocket_connect("/echo", headers={"host": "localhost:8470"}) as socket:
        socket.send_text("before")
        assert socket.receive_text() == "before"
        path.write_text(TOKEN[::-1])
        os.utime(path, (1, 1))  # a clock need not have moved on
        socket.send_text("after")
        with pytest.raises(WebSocketDisconnect) as ended:
            socket.receive_text()
        assert ended.value.code == 1008
    assert guarded.get("/x").status_code == 401
    assert guarded.get("/x", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 401
    assert guarded.get("/x", headers={"authorization": f"Bearer {TOKEN[::-1]}"}).status_code == 200
    path.unlink()
    assert guarded.get("/x", headers={"authorization": f"Bearer {TOKEN[::-1]}"}).status_code == 401
    assert guarded.get("/x", headers={"authorization": "Bearer "}).status_code == 401
    assert "nobody is let in: service.token_file" in caplog.text and TOKEN not in caplog.text


def test_a_stream_of_events_ends_with_the_session_of_who_follows_it():
    sessions = Sessions(TOKEN)
    headers = {"cookie": f"{sessions.cookie}={sessions.new()}"}
    sessions_of_the_app = client(app(sessions))
    said = sessions_of_the_app.get("/events", headers=headers)
    assert said.text == "one\ntwo\n"  # and no three: it logs out after the second


def app(sessions=None, **service):
    """A guarded app that answers what reaches it."""

    async def text(request):
        return PlainTextResponse(f"got {len(await request.body())}")

    async def page(_):
        return HTMLResponse("<script>1</script><p>&lt;script&gt;</p><SCRIPT>2</SCRIPT><script type='module'>3</script>")

    async def socket(websocket):
        await websocket.accept()
        await websocket.send_text("hello")

    async def echo(websocket):
        await websocket.accept()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    async def events(request):
        async def lines():
            yield "one\n"
            yield "two\n"
            sessions.end(request.headers)
            yield "three\n"
            yield "four\n"

        return StreamingResponse(lines(), media_type="text/event-stream")

    routes = [
        Route("/page", page),
        Route("/events", events),
        WebSocketRoute("/echo", echo),
        WebSocketRoute("/socket", socket),
        Route("/{path:path}", text, methods=["GET", "POST"]),
    ]
    return Guard(Starlette(routes=routes), ServiceConfig(**service), sessions)


def client(guard, host="localhost:8470", address="testclient"):
    return TestClient(guard, base_url=f"http://{host}", follow_redirects=False, client=(address, 50000))


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8470", "[::1]:8470", "10.0.0.7", "LOCALHOST.", "run.localhost", "box.example.org"]
)
def test_names_of_the_service_are_let_in(host):
    assert client(app(hosts=["Box.example.org"]), host).get("/x").status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "", "a b", "127.0.0.1@evil.example:1"],
)
def test_a_name_that_leads_here_by_a_trick_is_turned_away(host):
    answer = client(app()).get("/x", headers={"host": host})
    assert answer.status_code == 403 and "service.hosts" in answer.json()["detail"]


def test_no_page_believes_what_a_request_says_of_a_proxy():
    async def names(request):
        return PlainTextResponse(" ".join(request.headers))

    guard = Guard(Starlette(routes=[Route("/x", names)]), ServiceConfig(), None)
    said = client(guard).get(
        "/x", headers={"X-Forwarded-Prefix": "//evil.example", "x-forwarded-host": "evil", "x-y": "z"}
    )
    assert "x-y" in said.text and "x-forwarded" not in said.text


def test_pages_of_other_origins_are_turned_away():
    get, post = client(app()).get, client(app()).post
    json = {"content-type": "application/json"}
    for origin in ("http://evil.example", "null", "http://localhost:9999", "http://localhost", ""):
        assert get("/x", headers={"origin": origin}).status_code == 403
        assert post("/api/orders/pause", content="{}", headers={"origin": origin, **json}).status_code == 403
    assert (
        post("/api/orders/pause", content="{}", headers={"origin": "http://localhost:8470", **json}).status_code == 200
    )
    assert post("/api/orders/pause", content="{}", headers={"sec-fetch-site": "cross-site", **json}).status_code == 403
    assert get("/x", headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link from elsewhere


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonx"]
)
def test_orders_must_be_json(kind):
    headers = {} if kind is None else {"content-type": kind}
    assert client(app()).post("/api/orders/pause", content=b"{}", headers=headers).status_code == 415


def test_bodies_are_bounded():
    post, json = client(app()).post, {"content-type": "application/json"}

    def chunks(size):
        yield from (b"x" * 1000 for _ in range(size // 1000))

    limit = access.LARGEST_ELSE
    assert post("/api/orders/pause", content=b"x" * limit, headers=json).text == f"got {limit}"
    assert post("/api/orders/pause", content=b"x" * (limit + 1), headers=json).status_code == 413
    assert post("/api/orders/pause", content=chunks(limit + 1000), headers=json).status_code == 413  # of unknown length
    assert post("/api/prompts", content=b"x" * (limit + 1), headers=json).status_code == 200
    assert post("/api/prompts", content=chunks(access.LARGEST["/api/prompts"] + 1000), headers=json).status_code == 413
    for length in ("-1", "1e9", "9" * 30, "x"):
        assert post("/api/orders/pause", content=b"{}", headers={**json, "content-length": length}).status_code == 413


def test_with_a_token_everything_asks_for_it():
    sessions = Sessions(TOKEN)
    get = client(app(sessions)).get
    for path in ("/", "/api/run", "/metrics", "/_nicegui/x.js", "/healthz/x", "//healthz"):
        answer = get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    for path in access.OPEN:
        assert get(path).status_code == 200
    page = get("/pairs", headers={"accept": "text/html,*/*"})
    assert (page.status_code, page.headers["location"]) == (303, "/login")
    assert get("/api/run", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    for wrong in (f"Bearer {TOKEN}x", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer é"):
        assert get("/api/run", headers={"authorization": wrong.encode()}).status_code == 401
    assert get("/api/run", headers={"cookie": f"a=b; {sessions.cookie}={sessions.new()}"}).status_code == 200
    for wrong in (
        f"{sessions.cookie}=x",
        f"{sessions.cookie}={Sessions(TOKEN).new()}",
        f"other={sessions.new()}",
        "=;=,\x01",
    ):
        assert get("/api/run", headers={"cookie": wrong}).status_code == 401


def test_an_address_with_wrong_tokens_waits_and_no_other_one_does():
    sessions = Sessions(TOKEN)
    guard = app(sessions)

    def get(token, address="192.0.2.1", **headers):
        headers |= {"authorization": f"Bearer {token}"} if token else {}
        return client(guard, address=address).get("/api/run", headers=headers)

    assert [get(f"{n}").status_code for n in range(MOST)] == [401] * MOST
    refused = get(TOKEN)
    assert refused.status_code == 429 and 0 < int(refused.headers["retry-after"]) <= SECONDS
    with (
        pytest.raises(WebSocketDisconnect),
        client(guard, address="192.0.2.1").websocket_connect(
            "ws://localhost:8470/socket", headers={"authorization": f"Bearer {TOKEN}"}
        ) as socket,
    ):
        socket.receive_text()
    assert sessions.attempts.wait("192.0.2.1")  # the log-in waits too
    assert get("", cookie=f"{sessions.cookie}={sessions.new()}").status_code == 200
    assert get(TOKEN, "192.0.2.2").status_code == 200
    for number in range(ADDRESSES + 20):
        sessions.attempts.wrong(f"198.51.{number >> 8}.{number & 255}")
    assert len(sessions.attempts._wrong) == ADDRESSES


def test_sockets_are_guarded_too():
    def connect(guard, **headers):
        with client(guard).websocket_connect("/socket", headers={"host": "localhost:8470", **headers}) as socket:
            return socket.receive_text()

    assert connect(app()) == connect(app(), origin="http://localhost:8470") == "hello"
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect):
            connect(app(), **headers)
    with pytest.raises(WebSocketDisconnect):
        connect(app(Sessions(TOKEN)))
    assert connect(app(Sessions(TOKEN)), authorization=f"Bearer {TOKEN}") == "hello"


def test_headers_of_answers():
    answer = client(app()).get("/x")
    assert answer.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "same-origin"
    refused = client(app()).get("/x", headers={"host": "evil.example"})
    assert refused.headers["x-frame-options"] == "DENY"


def test_only_scripts_with_the_nonce_of_the_page_run():
    one, other = client(app()).get("/page"), client(app()).get("/page")
    policy = one.headers["content-security-policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert (
        "script-src 'self' 'unsafe-eval' 'nonce-" in policy
        and "frame-ancestors 'none'" in policy
        and "unsafe-inline'; img" in policy
    )
    assert one.text == (
        f'<script nonce="{nonce}">1</script><p>&lt;script&gt;</p><SCRIPT>2</SCRIPT><script nonce="{nonce}" type=\'module\'>3</script>'
    )
    assert int(one.headers["content-length"]) == len(one.content)
    assert nonce not in other.text


def test_lifespan_passes_through():
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["type"])

    asyncio.run(Guard(inner, ServiceConfig(), None)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
