"""The library of the Hub on bounded connections: against servers that drip, lie or hang up, and with the library's own calls."""

import dataclasses
import hashlib
import re
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
from http_stand_in import Talk, answers, head, raw
from huggingface_hub import constants, errors

from reward import hub, hub_transport
from reward.hub_transport import httpx

ROOT = Path(__file__).resolve().parents[2]
FETCHES = re.compile(
    r"HfApi\(|hf_hub_download\(|snapshot_download\(|load_dataset\(|SentenceTransformer\(|TaskManager\("
    r"|PreTrainedTokenizerFast\.from_pretrained\("
)
FILE = bytes(range(256)) * 3 * 2**15  # 24 MB: the library keeps pieces of 10 MB


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_transport, "WHOLE", 2**16)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_transport, "PATIENCE", 0.25)


@pytest.fixture
def client():
    with hub_transport.client() as made:
        yield made


@pytest.fixture
def without_handshake(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said by https goes over a plain connection. The handshake is tested in test_reward_http.py."""
    opened = hub_transport.opened
    monkeypatch.setattr(
        hub_transport, "opened", lambda to, *rest: opened(dataclasses.replace(to, scheme="http"), *rest)
    )


def drips(start: bytes, drop: bytes) -> Talk:
    def talk(taken: socket.socket) -> None:
        head(taken)
        taken.sendall(start)
        while True:
            taken.sendall(drop)
            time.sleep(0.05)

    return talk


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "talk",
    [
        drips(b"", b"H"),
        drips(OK, b"a: b\r\n"),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drips(OK + b"content-length: 999999\r\n\r\n", b"x"),
        drips(CHUNKED, b"1\r\nx\r\n"),
        drips(CHUNKED + b"0\r\n", b"a: b\r\n"),
        drips(OK + b"content-length: 5\r\n\r\n", b""),
        lambda taken: time.sleep(3),
    ],
    ids=["status", "headers", "interim", "content", "chunks", "trailers", "silence", "no word"],
)  # fmt: skip
def test_nothing_stretches_an_answer(client, impatient, talk) -> None:
    began = time.monotonic()
    with raw(talk) as at, pytest.raises((httpx.TimeoutException, httpx.RemoteProtocolError)):
        client.get(f"http://{at}/api/models/a")
    assert time.monotonic() - began < 2


def test_a_question_has_the_patience_that_it_says(client) -> None:
    began = time.monotonic()
    with raw(drips(b"", b"H")) as at, pytest.raises(httpx.TimeoutException):
        client.get(f"http://{at}/api/models/a", timeout=0.3)
    assert time.monotonic() - began < 2


@pytest.mark.service
def test_a_reader_that_takes_its_time_is_not_the_servers_fault(client, monkeypatch) -> None:
    monkeypatch.setattr(hub_transport, "PATIENCE", 1.0)
    pieces = (OK + b"content-length: 20000\r\n\r\n" + b"x" * 10_000, b"x" * 10_000)
    with raw(answers(*pieces)) as at, client.stream("GET", f"http://{at}/a/resolve/main/b") as answer:
        came = 0
        for piece in answer.iter_bytes():
            came += len(piece)
            time.sleep(1.3)
    assert came == 20_000


def test_what_does_not_stream_is_bounded(client) -> None:
    long = OK + b"content-length: 70000\r\n\r\n" + b"x" * 70_000
    with (
        raw(answers(long)) as at,
        raw(answers(b"HTTP/1.1 302 Found\r\nlocation: http://%s/b\r\n\r\n" % at.encode())) as by,
    ):
        for first in (at, by):
            with pytest.raises(httpx.RemoteProtocolError, match="more than 65536 bytes"):
                client.get(f"http://{first}/a")
            with client.stream("GET", f"http://{first}/a") as answer:
                assert len(answer.read()) == 70_000


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_does_not_say_how_long_it_is_is_bounded(client, streams) -> None:
    def talk(taken: socket.socket) -> None:
        head(taken)
        taken.sendall(CHUNKED)
        while True:
            taken.sendall(b"4000\r\n" + b" " * 0x4000 + b"\r\n")

    with raw(talk) as at, pytest.raises(httpx.RemoteProtocolError, match="more than 65536 bytes"):
        if streams:
            with client.stream("GET", f"http://{at}/a") as answer:
                answer.read()
        else:
            client.get(f"http://{at}/a")


def test_chunks_of_a_byte_neither_take_the_memory_nor_the_time(client, impatient, monkeypatch) -> None:
    """Parsing them is what takes long: 64 MB of content would be an hour of it."""
    monkeypatch.setattr(hub_transport, "WHOLE", 2**26)
    chunks = b"1\r\n \r\n" * 10_000
    began = time.monotonic()
    with raw(drips(CHUNKED, chunks)) as at, pytest.raises(httpx.TimeoutException):
        client.get(f"http://{at}/a")
    assert time.monotonic() - began < 3


def test_nothing_is_decompressed(client) -> None:
    packed = answers(OK + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\nxx")
    with raw(packed) as at, pytest.raises(httpx.RemoteProtocolError, match="compressed"):
        client.get(f"http://{at}/api/models/a")


def test_a_key_goes_to_no_other_host(client) -> None:
    seen = []

    def other(taken: socket.socket) -> None:
        seen.append(head(taken))
        taken.sendall(OK + b"content-length: 0\r\n\r\n")

    with raw(other) as cdn:
        away = b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\nlocation: http://localhost:%s/file\r\n\r\n"
        with raw(answers(away % cdn.partition(":")[2].encode())) as at:
            client.get(f"http://{at}/a/resolve/main/b", headers={"authorization": "Bearer hf_secret"})
    assert b"GET /file" in seen[0] and b"hf_secret" not in seen[0]


def test_what_streams_ends_where_its_answer_said(client) -> None:
    with (
        raw(answers(OK + b"content-length: 5\r\n\r\n" + b"x" * 70_000, b"y" * 70_000)) as at,
        client.stream("GET", f"http://{at}/a") as answer,
    ):
        assert answer.read() == b"xxxxx"


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("where", ["http://%s/b", "HTTP://%s/b", "ftp://%s/b"])
def test_no_redirect_leads_from_tls_to_a_connection_without_it(client, without_handshake, where, follow) -> None:
    asked = []
    with raw(lambda taken: asked.append(head(taken))) as by:
        away = b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\nlocation: %s\r\n\r\n" % (where % by).encode()
        with raw(answers(away)) as at, pytest.raises(httpx.RemoteProtocolError, match="without TLS"):
            client.get(f"https://{at}/a", follow_redirects=follow)
    assert asked == []


def test_a_redirect_from_tls_to_tls_is_followed(client, without_handshake) -> None:
    def talk(taken: socket.socket) -> None:
        found = b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\nlocation: /b\r\n\r\n"
        taken.sendall(found if head(taken).startswith(b"GET /a") else OK + b"content-length: 2\r\n\r\nok")

    with raw(talk) as at:
        assert client.get(f"https://{at}/a").text == "ok"


def test_the_proxy_of_the_environment_is_used(client, monkeypatch) -> None:
    asked = []

    def proxy(taken: socket.socket) -> None:
        asked.append(head(taken).split(b"\r\n")[0])
        taken.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        head(taken)
        taken.sendall(OK + b"content-length: 2\r\n\r\nok")

    with raw(proxy) as at:
        monkeypatch.setenv("http_proxy", f"http://{at}")
        assert client.get("http://hub.test/api/models/a").text == "ok"
        monkeypatch.setenv("no_proxy", "hub.test")
        with pytest.raises(httpx.ConnectError):
            client.get("http://hub.test/api/models/a")
    assert asked == [b"CONNECT hub.test:80 HTTP/1.1"]


def test_without_a_network_by_wish_nothing_is_asked(client, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.OfflineModeIsEnabled):
        client.get("http://127.0.0.1:9/api/models/a")


@pytest.mark.service
def test_a_large_file_comes_whole_though_its_server_hangs_up(tmp_path, monkeypatch) -> None:
    """By the library's own download: it goes on where the first connection ended."""
    asked = []

    def talk(taken: socket.socket) -> None:
        said = head(taken).decode()
        told = f'etag: "{hashlib.sha256(FILE).hexdigest()}"\r\nx-repo-commit: {"a" * 40}\r\naccept-ranges: bytes\r\n'
        if said.startswith("HEAD"):
            taken.sendall(f"HTTP/1.1 200 OK\r\n{told}content-length: {len(FILE)}\r\n\r\n".encode())
            return
        start = int(found[1]) if (found := re.search(r"range: bytes=(\d+)-", said.lower())) else 0
        asked.append(start)
        rest = FILE[start:]
        status = f"206 Partial\r\ncontent-range: bytes {start}-{len(FILE) - 1}/{len(FILE)}" if start else "200 OK"
        taken.sendall(f"HTTP/1.1 {status}\r\n{told}content-length: {len(rest)}\r\n\r\n".encode())
        taken.sendall(rest if start else rest[: len(rest) // 2])

    try:
        huggingface_hub.set_client_factory(hub_transport.client)
        with raw(talk) as at:
            path = huggingface_hub.hf_hub_download(
                "org/model", "model.safetensors", endpoint=f"http://{at}", cache_dir=tmp_path, token=False
            )
    finally:
        huggingface_hub.set_client_factory(lambda: hub_transport.DEFAULT)
    assert Path(path).read_bytes() == FILE and asked[0] == 0 < asked[1]


def test_every_module_that_fetches_from_the_hub_is_bounded() -> None:
    files = [path for folder in ("selfplay", "reward") for path in (ROOT / folder).rglob("*.py")]
    fetching = [path for path in files if FETCHES.search(path.read_text(encoding="utf-8"))]
    assert len(fetching) > 6
    assert not [str(path) for path in fetching if "hub.bounded()" not in path.read_text(encoding="utf-8")]


def test_xet_is_off_unless_it_is_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub, "set_client_factory", lambda factory: None)
    for asked, off in ((None, True), ("0", False), ("1", True)):
        monkeypatch.delenv(hub.XET, raising=False)
        if asked is not None:
            monkeypatch.setenv(hub.XET, asked)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", None)
        hub.bounded.__wrapped__()
        assert constants.HF_HUB_DISABLE_XET is off
