"""The HTTP channel against servers on raw sockets that are broken or hostile, through proxies, and with TLS."""

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from http_stand_in import answers, head, raw

from reward import wire
from reward.addresses import InvalidAddress, address
from reward.http import ConnectError, Http, LateAnswer, ProtocolError, ask, bearer
from reward.proxies import proxy_of

ROOT = Path(__file__).resolve().parents[2]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.mark.service
def test_no_score_is_wrong_and_no_deadline_is_passed_under_faults_of_every_kind() -> None:
    argv = [sys.executable, str(ROOT / "scripts/http_faults.py"), "--requests", "160"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout)["seen"]["scored"] > 120


def test_an_answer_to_half_a_request_is_an_answer_to_none() -> None:
    body = b"x" * 2**25  # more than the buffers of a connection hold
    with raw(answers(OK)) as at, pytest.raises(ProtocolError, match="before the whole request"):
        ask("POST", f"http://{at}", body=body, seconds=5, limit=100)
    with raw(answers(b"HTTP/1.1 413 No\r\ncontent-length: 4\r\n\r\nmuch")) as at:
        answer = ask("POST", f"http://{at}", body=body, seconds=5, limit=100)
        assert (answer.status, answer.content) == (413, b"much")


def test_a_connection_is_kept_only_for_an_answer_that_names_its_request() -> None:
    ports: list[int] = []

    def talk(taken: socket.socket) -> None:
        while b"GET" in head(taken):
            ports.append(taken.getpeername()[1])
            taken.sendall(OK)

    with raw(talk) as at:
        http = Http(2)
        for named in (False, True, True):
            with http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer:
                answer.named = named
        with (
            pytest.raises(ProtocolError, match="does not name its request"),
            http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer,
        ):
            assert answer.reused
        with pytest.raises(KeyError), http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer:
            answer.named = True
            raise KeyError
        with http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer:
            assert not answer.reused
        http.close()
    assert ports[1] == ports[2] == ports[3] and len(set(ports)) == 4


@pytest.mark.parametrize("left", [OK, b"x"])
def test_a_connection_with_a_byte_left_is_not_used_again(left: bytes) -> None:
    with raw(answers(OK, left)) as at:
        http = Http(1)
        with http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer:
            answer.named = True
        time.sleep(0.1)
        with http.ask("GET", f"http://{at}", seconds=5, limit=100) as answer:
            assert answer.content == b"ok"
        http.close()


def test_an_answer_of_no_interest_is_not_read() -> None:
    def talk(taken: socket.socket) -> None:
        head(taken)
        taken.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            taken.sendall(b"x" * 65536)

    with raw(talk) as at:
        assert ask("POST", f"http://{at}", body=b"{}", seconds=5, limit=0).success
        with pytest.raises(ProtocolError, match="more than 1000 bytes"):
            ask("GET", f"http://{at}", seconds=5, limit=1000)


def test_a_key_is_in_no_message() -> None:
    key = "sk-hush-hush"
    assert bearer(f" {key}\n") == f"Bearer {key}"
    for bad in ("\n", f"{key}\x00", f"{key}é", f"{key}\n1"):
        with pytest.raises(ValueError, match="no header of HTTP") as refused:
            bearer(bad)
        assert key not in str(refused.value)
    with raw(answers(OK)) as at:
        for value in (f"Bearer {key}\n", f"Bearer {key}é"):
            with pytest.raises(ProtocolError, match="does not allow") as error:
                ask("GET", f"http://{at}", seconds=5, limit=100, headers={"authorization": value})
            assert key not in "".join(traceback.format_exception(error.value))


def test_a_name_that_is_not_found_in_time_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    real = socket.getaddrinfo

    def slow(*given: Any, **more: Any) -> Any:
        if "flags" not in more:
            over.wait(10)
        return real(*given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    began = time.monotonic()
    with pytest.raises(ConnectError, match="not found in time"):
        ask("GET", "http://nowhere.invalid", seconds=0.3, limit=100)
    assert time.monotonic() - began < 1
    over.set()


def test_silence_before_and_after_the_handshake_ends_in_time() -> None:
    with raw(lambda taken: time.sleep(2)) as at:
        for scheme, error in (("http", LateAnswer), ("https", ConnectError)):
            began = time.monotonic()
            with pytest.raises(error):
                ask("GET", f"{scheme}://{at}", seconds=0.3, limit=100)
            assert time.monotonic() - began < 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "all.pem"
    subprocess.run(
        [*"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x".split(),
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path) + ".crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_text(path.read_text() + Path(str(path) + ".crt").read_text())
    return path


def test_tls_is_spoken_with_those_only_who_prove_who_they_are(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    large = b"x" * 2**21

    def talk(taken: socket.socket) -> None:
        with context.wrap_socket(taken, server_side=True) as safe:
            while b"POST" in (came := head(safe)):
                left = len(large) - len(came.partition(b"\r\n\r\n")[2])
                while left > 0:
                    left -= len(safe.recv(65536))
                safe.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(large), large))

    with raw(talk) as at:
        with pytest.raises(ConnectError, match="certificate verify failed"):
            ask("POST", f"https://{at}", body=large, seconds=5, limit=2**22)
        monkeypatch.setattr(wire, "tls", lambda: ssl.create_default_context(cafile=str(certificate)))
        assert ask("POST", f"https://{at}", body=large, seconds=5, limit=2**22).content == large
        with pytest.raises(ConnectError, match=r"certificate is not valid for 'localhost'|Hostname mismatch"):
            ask("POST", f"https://{at.replace('127.0.0.1', 'localhost')}", body=large, seconds=5, limit=2**22)


def test_a_proxy_is_used_where_one_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def proxy(taken: socket.socket) -> None:
        asked.append(head(taken))
        taken.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        asked.append(head(taken))
        taken.sendall(OK)

    with raw(proxy) as at:
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        monkeypatch.setenv("A_PROXY", f"http://me:se%20cret@{at}")
        answer = ask("GET", "http://far.example:81/a?b", seconds=5, limit=100, proxy=proxy_of("A_PROXY"))
        assert answer.content == b"ok"
    assert asked[0].startswith(b"CONNECT far.example:81 HTTP/1.1\r\n")
    assert b"proxy-authorization: Basic bWU6c2UgY3JldA==" in asked[0]
    assert asked[1].startswith(b"GET /a?b HTTP/1.1\r\nhost: far.example:81\r\n")
    refuses = answers(b"HTTP/1.1 407 Who\r\ncontent-length: 0\r\n\r\n")
    with raw(refuses) as at, pytest.raises(ConnectError, match="the proxy answers HTTP 407"):
        ask("GET", "https://far.example", seconds=5, limit=100, proxy=f"http://{at}")
    with pytest.raises(InvalidAddress, match=r"in \$NO_SUCH, which is not set"):
        proxy_of("NO_SUCH")


def test_an_address_is_taken_apart() -> None:
    found = address("https://me:pass@[::1]:8443/ü b?q=1")
    assert (found.host, found.port, found.authority) == ("::1", 8443, "[::1]:8443")
    assert (found.target, found.login) == ("/%C3%BC%20b?q=1", "Basic bWU6cGFzcw==")
    assert address("http://bücher.example").authority == "xn--bcher-kva.example"
    for wrong in ("http://a b", "ftp://a", "http://[::1", "http://a:0"):
        with pytest.raises(InvalidAddress):
            address(wrong)
