"""Alerts to a real HTTP server that does not take them at first."""

import contextlib
import socket
import threading
import time

import pytest
from daemon_world import until, webhook

from reward.http import HttpError
from selfplay.service import alerts
from selfplay.service.alerts import Alerts
from selfplay.storage.ledger import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(alerts, "LONGEST_WAIT", 0)


def test_an_alert_is_posted_until_it_is_taken(store, caplog):
    caplog.set_level("INFO")
    with webhook(*[500] * 9) as (url, got):
        found = Alerts(lambda: url, threading.Event())
        found.send({"text": "one"})
        found.send({"text": "two"})
        until(lambda: len(got) == 11)
        assert [body["text"] for _, body in got] == ["one"] * 10 + ["two"]
        until(lambda: found._sender is None)
        found.keep(store)
    assert store.state(alerts.STATE) == []
    assert "does not take alerts (500)" in caplog.text and "secret" not in caplog.text


def test_an_alert_that_was_not_taken_outlives_the_service(store):
    stopping = threading.Event()
    first = Alerts(lambda: "http://127.0.0.1:9/nobody", stopping)
    first.send({"text": "the disk is full"})
    first.keep(store)
    stopping.set()
    first._sender.join(60)
    with webhook() as (url, got):
        second = Alerts(lambda: url, threading.Event())
        second.load(store)
        until(lambda: got)
        assert got == [("/secret", {"text": "the disk is full"})]
        until(lambda: second._sender is None)
        second.keep(store)
    assert store.state(alerts.STATE) == []


def test_what_is_refused_for_what_is_in_it_keeps_nothing_back(caplog):
    with webhook(400, 429) as (url, got):
        found = Alerts(lambda: url, threading.Event())
        found.send({"text": "one"})
        found.send({"text": "two"})
        until(lambda: len(got) == 3)
        assert [body["text"] for _, body in got] == ["one", "two", "two"]
        until(lambda: found._sender is None)
    assert "refused an alert, which is dropped (400)" in caplog.text and "secret" not in caplog.text


def test_a_wrong_address_drops_nothing_and_is_seen_until_it_is_mended(store):
    def told():
        return [event["text"] for event in store.events() if event["kind"] == alerts.TROUBLE]

    stopping = threading.Event()
    with webhook(*[404] * 10_000) as (url, got):
        first = Alerts(lambda: url, stopping)
        first.load(store)
        first.send({"text": "paused"})
        until(lambda: len(got) > 1)
        first.keep(store)
        first.keep(store)
        assert store.state(alerts.TROUBLE) == "the webhook does not take alerts (404)" and len(told()) == 1
        stopping.set()
        first._sender.join(60)
    with webhook() as (url, got):
        second = Alerts(lambda: url, threading.Event())
        second.load(store)
        until(lambda: second._sender is None)
        second.keep(store)
    assert [body["text"] for _, body in got] == ["paused"] and store.state(alerts.STATE) == []
    assert store.state(alerts.TROUBLE) == "" and told()[1:] == ["the webhook takes alerts"]


def test_an_outage_with_many_faces_is_one_event(store):
    found = Alerts(lambda: None, threading.Event())
    for face in ("ConnectError", "503", "404"):
        found._trouble = f"the webhook does not take alerts ({face})"
        found.keep(store)
    assert store.state(alerts.TROUBLE).endswith("(404)")
    assert [event["text"] for event in store.events()] == ["the webhook does not take alerts (ConnectError)"]


def test_without_a_webhook_none_is_in_trouble(store):
    store.set_state(alerts.TROUBLE, "the webhook does not take alerts (404)")
    nowhere = Alerts(lambda: None, threading.Event())
    nowhere.load(store)
    nowhere.keep(store)
    assert store.state(alerts.TROUBLE) == ""


def test_whatever_fails_is_tried_again(monkeypatch, caplog):
    monkeypatch.setenv("A_PROXY", "nonsense")
    proxies = ["A_PROXY"]
    with webhook() as (url, got):
        found = Alerts(lambda: url, threading.Event(), lambda: proxies[0] if proxies else None)
        found.send({"text": "one"})
        until(lambda: "(InvalidAddress)" in caplog.text)
        proxies.clear()
        until(lambda: got)


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 OK\r\nx-a: ", b"a"),  # a header that drips
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 2**20),  # a body without an end
    ],
)
def test_an_answer_without_an_end_takes_neither_time_nor_memory(monkeypatch, start, more):
    monkeypatch.setattr(alerts, "SECONDS", 0.5)
    taken = []

    def talk(connection):
        connection.settimeout(5)
        connection.recv(65536)
        connection.sendall(start)
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(more)
                taken.append(len(more))
                time.sleep(0.01)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: talk(server.accept()[0]), daemon=True).start()
        began = time.monotonic()
        try:
            assert alerts.post(f"http://127.0.0.1:{server.getsockname()[1]}/secret", {"text": "one"}) == 200
        except HttpError:
            assert len(more) < 100
        assert time.monotonic() - began < 1.5
    assert sum(taken) < 2**25


def test_every_text_can_be_posted():
    with webhook() as (url, got):
        Alerts(lambda: url, threading.Event()).send({"text": "größer \udc80"})
        until(lambda: got)
        assert got[0][1] == {"text": "größer �"}


def test_what_an_earlier_service_left_is_older(store):
    for texts in (range(alerts.MOST - 1), ("new", "newer")):
        each = Alerts(lambda: None, threading.Event())
        for text in texts:
            each.send({"text": str(text)})
        each.load(store)
        each.keep(store)
    kept = [alert["text"] for alert in store.state(alerts.STATE)]
    assert kept == [*map(str, range(1, alerts.MOST - 1)), "new", "newer"]


def test_without_a_webhook_the_newest_are_kept(store):
    nowhere = Alerts(lambda: None, threading.Event())
    for number in range(alerts.MOST + 5):
        nowhere.send({"text": str(number)})
    nowhere.keep(store)
    assert [each["text"] for each in store.state(alerts.STATE)] == [str(i) for i in range(5, alerts.MOST + 5)]
