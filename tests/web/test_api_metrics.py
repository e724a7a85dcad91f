"""What `/metrics` gives to Prometheus."""

import prometheus_client.parser
import pytest
from served_world import config
from starlette.testclient import TestClient

from selfplay.storage.ledger import Store
from selfplay.web.api import create_app

pytestmark = pytest.mark.service


def scraped(client):
    families = prometheus_client.parser.text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_tell_what_is_left_to_do_and_why_nothing_is_done(client, run):
    found = scraped(client)
    assert found["selfplay_queue_depth", "generate"] == 192 - 64
    assert not any(name == "selfplay_pause_info" for name, *_ in found)
    store = Store(run[0])
    run[1].said = {"state": "paused", "why": "ordered"}
    for pause, labels in (
        ({"why": "ordered, after the round", "after": "round"}, ("ordered", "ordered, after the round")),
        ({"why": "x" * 900, "kind": "failed"}, ("failed", "x" * 200)),
    ):
        store.set_state("pause", pause)
        found = scraped(client)
        assert [key[1:] for key in found if key[0] == "selfplay_pause_info"] == [labels]
        assert not any(name == "selfplay_queue_depth" for name, *_ in found)
    store.close()


def test_metrics_for_prometheus(client):
    found = scraped(client)
    assert found["selfplay_state", "running"] == 1 and found["selfplay_state", "paused"] == 0
    assert found["selfplay_rounds_total", "promoted"] == 3 and found["selfplay_rounds_total", "rejected"] == 2
    assert found["selfplay_rounds_total", "skipped"] == found["selfplay_rounds_total", "cancelled"] == 0
    assert (
        found["selfplay_restarts_total", "engine_restart"] == 1
        and found["selfplay_restarts_total", "swap_restart"] == 0
        and found["selfplay_restarts_total", "trainer_restart"] == 0
    )
    assert found["selfplay_stage_seconds_total", "train"] == pytest.approx(5 * 5.2)
    assert found["selfplay_last_stage_seconds", "train"] == 5.2
    assert found["selfplay_tokens_per_second", "generate"] == 5250
    assert found["selfplay_margin", "explicit"] == 1.1 and found["selfplay_margin", "implicit"] == 0.12
    assert found["selfplay_beta", "start"] == 0.1 and found["selfplay_beta", "end"] < 0.1
    assert found["selfplay_win_rate", "low"] < found["selfplay_win_rate", "mean"] < found["selfplay_win_rate", "high"]
    assert found["selfplay_guard", "ties"] == 0.125 and found["selfplay_guard", "shift"] == 0.25
    assert found[("selfplay_gate_independent",)] == 0
    assert {("selfplay_reward", a) for a in ("sampled", "champion", "candidate")} <= found.keys()
    assert (found[("selfplay_orders_pending",)], found[("selfplay_policy",)], found[("selfplay_round",)]) == (0, 5, 5)
    assert found[("process_resident_memory_bytes",)] > 0


def test_a_webhook_that_does_not_take_alerts_is_seen(client, run):
    assert client.get("/api/run").json()["webhook"] == "" and scraped(client)[("selfplay_webhook_failing",)] == 0
    store = Store(run[0])
    store.set_state("webhook", "the webhook does not take alerts (404)")
    store.close()
    assert client.get("/api/run").json()["webhook"].endswith("(404)")
    assert scraped(client)[("selfplay_webhook_failing",)] == 1


def test_metrics_of_a_run_that_has_nothing_yet(tmp_path):
    client = TestClient(create_app(tmp_path, config(), dict, None, page=False), base_url="http://localhost")
    assert 'selfplay_state{state="starting"} 1.0' in client.get("/metrics").text
    for path in (
        "/api/run",
        "/api/rounds",
        "/api/pairs",
        "/api/policies",
        "/api/events",
        "/api/orders",
        "/api/prompts",
        "/api/rounds/1/histogram",
    ):
        assert client.get(path).status_code == 200
    assert client.get("/api/run").json()["current_policy"] is None
