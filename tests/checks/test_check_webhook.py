"""The webhook as `selfplay check` sees it: no false alert, and a test only where it is asked for."""

import pytest
from daemon_world import webhook
from mini import TINY

from selfplay.checks.check import LOOKS, check
from selfplay.checks.webhook import TEST, takes
from selfplay.config import load


def looked(tmp_path):
    (look,) = [look for look in LOOKS if look[0] == "webhook"]
    found = check(load(TINY), tmp_path / "run", [look])
    assert {f.about for f in found} == {"webhook"}
    return [(f.level, f.text) for f in found]


def test_an_address_that_answers_gets_no_alert(tmp_path, monkeypatch):
    with webhook() as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        ((level, text),) = looked(tmp_path)
    assert level == "ok" and "$SELFPLAY_WEBHOOK answers" in text and got == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/secret", "no address: secret", "http://secret.invalid/"])
def test_an_address_that_does_not_answer_is_a_warning_without_its_name(tmp_path, monkeypatch, url):
    monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
    ((level, text),) = looked(tmp_path)
    assert level == "warning" and "does not answer" in text and "secret" not in text


def test_without_a_webhook_nothing_is_wrong(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFPLAY_WEBHOOK", raising=False)
    ((level, text),) = looked(tmp_path)
    assert level == "ok" and "not set" in text
    assert takes(load(TINY)).level == "error"


def test_a_test_alert_is_posted_once_and_says_that_it_is_one(monkeypatch):
    with webhook(200, 404, 400) as (url, got):
        monkeypatch.setenv("SELFPLAY_WEBHOOK", url)
        found = [takes(load(TINY)) for _ in range(3)]
    assert [f.level for f in found] == ["ok", "error", "error"]
    assert found[1].text.endswith("(404)") and "secret" not in found[1].text
    assert [(body["kind"], body["text"]) for _, body in got] == [("test", TEST)] * 3
