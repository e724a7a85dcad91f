import contextlib
import dataclasses
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import prometheus_client.parser
import pytest
from daemon_world import waiting
from served_world import HOSTILE, Progress, build, config
from starlette.testclient import TestClient

from selfplay.config import RetentionConfig, ServiceConfig
from selfplay.errors import ConfigError
from selfplay.prompts.pool import write_added
from selfplay.storage import retention, tables
from selfplay.storage.ledger import Store
from selfplay.types import Prompt
from selfplay.web import attempts, login
from selfplay.web import view as views
from selfplay.web.access import read_token
from selfplay.web.api import create_app
from selfplay.web.server import serve_in_thread

pytestmark = pytest.mark.service

TOKEN = "correct horse battery staple"


@pytest.fixture
def run(tmp_path):
    """A made-up run of five rounds, and what the service says of itself."""
    store = build(tmp_path / "run", rounds=5, pairs=20)
    yield tmp_path / "run", Progress()
    store.close()


@pytest.fixture
def client(run):
    return TestClient(create_app(run[0], config(), run[1], None, page=False), base_url="http://localhost")


def give(client, path, body):
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


def test_answers_to_the_audit_prompts(client):
    found = client.get("/api/answers", params={"columns": 2, "limit": 5}).json()
    assert [(c["policy"], c["round"], c["state"]) for c in found["columns"]] == [
        (0, None, "initial"), (3, 3, "promoted"), (5, 5, "promoted"),
    ]  # fmt: skip
    assert (found["total"], found["next"], found["earlier"]) == (12, 5, 3) and len(found["prompts"]) == 5
    assert found["prompts"][1]["messages"] == [{"role": "user", "content": HOSTILE}]
    said = found["prompts"][4]["answers"][2]
    assert (said["reward"], said["tokens"], said["thinking"], said["finish_reason"]) == (0.5, 13, 4, "stop")
    assert said["about"] == "0.500 (+0.040) · 13 tokens · 4 of them thoughts"
    assert "secret" not in json.dumps(found)  # gold answers stay in the run
    last = client.get("/api/answers", params={"before": 3, "after": 10}).json()
    assert [c["round"] for c in last["columns"]] == [None, 1] and (last["next"], last["earlier"]) == (None, None)
    assert len(last["prompts"]) == 2 and client.get("/api/answers", params={"before": 1}).json()["columns"] == []


def test_the_run_at_a_glance(client, run):
    found = client.get("/api/run").json()
    assert found["service"] == {
        "state": "running", "why": "", "since": None, "next_round": None, "round": 13, "stage": "generate", "done": 64, "total": 192,
        "unit": "prompts", "text": "5.2 k tokens/s", "seconds": 12.5,
    }  # fmt: skip
    assert (found["name"], found["current_policy"], found["orders_pending"], found["restarts"]) == ("tiny", 5, 0, 1)
    assert found["rounds"] == {"promoted": 3, "rejected": 2}
    run[1].said = {"state": "waiting", "why": "2031-01-01T00:00:00+00:00", "stage": "promote", "round": 5}
    service = client.get("/api/run").json()["service"]
    assert (service["state"], service["why"], service["next_round"], service["stage"]) == (
        "waiting",
        "",
        "2031-01-01T00:00:00+00:00",
        None,
    )


def test_a_service_that_has_not_come_up_does_not_show_what_the_last_one_said(client, run):
    store = Store(run[0])
    # a process of the same number, as the first one of every container is
    store.set_state("service", {"state": "running", "why": "", "pid": os.getpid(), "since": "then"})
    run[1].said = {}
    assert client.get("/api/run").json()["service"]["state"] == "starting"
    assert client.get("/readyz").status_code == 503
    run[1].said = {"state": "paused", "why": "ordered", "since": "now"}
    assert client.get("/api/run").json()["service"] | {"done": 0} == {
        **client.get("/api/run").json()["service"], "state": "paused", "why": "ordered", "since": "now",
    }  # fmt: skip
    assert client.get("/readyz").json() == {"status": "ok", "detail": "paused"}
    run[1].said = {"state": "stopped", "why": ""}
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").json() == {"status": "ok", "detail": ""}
    store.close()


def test_a_ledger_that_cannot_be_opened_yet_is_opened_later(tmp_path):
    """The page is there before it."""
    client = TestClient(
        create_app(tmp_path / "run", config(), Progress(), None, page=False), base_url="http://localhost"
    )
    assert client.get("/healthz").status_code == 200
    assert [client.get(path).status_code for path in ("/readyz", "/api/run")] == [503, 503]
    build(tmp_path / "run", rounds=1, pairs=4).close()
    assert [client.get(path).status_code for path in ("/readyz", "/api/run")] == [200, 200]


def test_a_ledger_that_is_damaged_is_not_ready(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database " * 100)
    client = TestClient(create_app(tmp_path, config(), Progress(), None, page=False), base_url="http://localhost")
    assert [client.get(path).status_code for path in ("/readyz", "/api/run")] == [503, 503]


def test_rounds(client):
    listed = client.get("/api/rounds", params={"limit": 2}).json()
    assert [(r["round"], r["state"]) for r in listed] == [(5, "promoted"), (4, "rejected")]
    assert listed[0]["metrics"]["pairs/kept"] == 10 and "generate/tokens" not in listed[0]["metrics"]
    assert [r["round"] for r in client.get("/api/rounds", params={"before": 2}).json()] == [1]
    one = client.get("/api/rounds/4").json()
    assert one["reasons"][0].startswith("win rate") and one["metrics"]["generate/tokens"] == 9000
    assert [s["stage"] for s in one["stages"]] == [
        "prompts",
        "generate",
        "score",
        "guard",
        "pairs",
        "depth",
        "train",
        "evaluate",
    ]
    assert one["seconds"] == pytest.approx(sum(s["seconds"] for s in one["stages"]))
    assert sum(one["pairs"].values()) == 20 and one["pairs"]["noise"] == one["pairs"]["nonfinite"] == 1
    assert client.get("/api/rounds/99").json() == {"detail": "there is no round 99"}
    bars = client.get("/api/rounds/4/histogram", params={"of": "explicit_margin", "bins": 5}).json()
    assert len(bars["edges"]) == 6 and sum(bars["kept"]) + sum(bars["dropped"]) == 20


def test_pairs_are_filtered_sorted_and_paged(client):
    first = client.get("/api/pairs", params={"sort": "potential", "kept": True, "limit": 3}).json()
    potentials = [p["potential"] for p in first["pairs"]]
    assert potentials == sorted(potentials, reverse=True) and all(p["kept_because"] for p in first["pairs"])
    second = client.get(
        "/api/pairs", params={"sort": "potential", "kept": True, "limit": 3, "after": first["next"]}
    ).json()
    assert second["pairs"][0]["potential"] <= potentials[-1]
    odd = client.get("/api/pairs", params={"reason": "nonfinite"}).json()["pairs"]
    assert [(p["round"], p["implicit_margin"], p["potential"]) for p in odd] == [
        (n, None, None) for n in (5, 4, 3, 2, 1)
    ]
    low = client.get(
        "/api/pairs",
        params={"round": 2, "explicit_min": 0.5, "explicit_max": 1.0, "sort": "explicit_margin", "descending": False},
    ).json()
    margins = [p["explicit_margin"] for p in low["pairs"]]
    assert margins == sorted(margins) and all(0.5 <= m <= 1.0 for m in margins)
    for bad in (
        {"sort": "prompt_id"},
        {"sort": "row; DROP TABLE pairs"},
        {"limit": 0},
        {"limit": 201},
        {"explicit_min": "nan"},
        {"after": "x"},
        {"round": 2**31},
    ):
        assert client.get("/api/pairs", params=bad).status_code == 422, bad


def test_a_pair_with_everything_that_decided_on_it(client):
    row = client.get("/api/pairs", params={"round": 3, "sort": "potential", "limit": 1}).json()["pairs"][0]
    pair = client.get(f"/api/pairs/3/{row['row']}").json()
    assert pair["potential"] == row["potential"] and (pair["rank"], pair["ranked"]) == (1, 18)
    assert pair["chosen"]["reward"] - pair["rejected"]["reward"] == pytest.approx(pair["explicit_margin"])
    assert pair["messages"] == [{"role": "user", "content": f"What follows from this? {row['row']}"}]
    assert (pair["cluster"], pair["closeness"], pair["added"]) == (row["row"] % 3, 0.5, 1)
    assert pair["settings"]["keep"] == 0.8 and pair["settings"]["noise"] == 1e-4
    hostile = client.get("/api/pairs/1/0").json()
    assert hostile["chosen"]["text"] == HOSTILE and len(hostile["rejected"]["text"]) > 100_000
    nonfinite = client.get("/api/pairs/1/18")  # NaN has no form in JSON
    assert nonfinite.json()["implicit_signed"] is None and nonfinite.json()["rank"] is None
    for absent in ("/api/pairs/1/999", "/api/pairs/77/0"):
        assert client.get(absent).status_code == 404


def test_a_pair_whose_artifacts_are_gone(client, run):
    (run[0] / "rounds" / "0002" / "prompts" / "prompts.parquet").unlink()
    assert client.get("/api/pairs/2/0").json()["messages"] == []
    (run[0] / "rounds" / "0002" / "pairs" / "pairs.parquet").unlink()
    assert client.get("/api/pairs/2/0").status_code == 404


def test_what_retention_deleted_is_said_and_a_pair_is_read_from_its_round(client, run):
    """Its candidates and the index of its pairs are gone; the pairs themselves are not."""
    store, before = Store(run[0]), client.get("/api/pairs/1/18").json()
    retention.apply(
        run_dir=run[0], settings=RetentionConfig(candidates_rounds=3, pair_rows_rounds=4), store=store, closed=5,
        needed_policies={5}, needed_rounds=1,
    )  # fmt: skip
    store.close()
    said = [client.get(f"/api/rounds/{index}").json()["deleted"] for index in (1, 2, 3)]
    assert list(map(len, said)) == [2, 1, 0]
    assert "deleted the candidates" in said[1][0] and "retention.pair_rows_rounds" in said[0][1]
    gone = client.get("/api/pairs", params={"round": 1}).json()
    assert gone["pairs"] == [] and "up to 1 from the lists" in gone["deleted"]
    assert client.get("/api/pairs", params={"round": 2}).json()["deleted"] == ""
    assert client.get("/api/pairs", params={"prompt_id": before["prompt_id"]}).json()["deleted"] == gone["deleted"]
    unranked = {"rank": None, "ranked": 0, "lowest_kept": None}
    for row in (0, 18):
        assert client.get(f"/api/pairs/1/{row}").status_code == 200
    assert client.get("/api/pairs/1/18").json() == {**before, **unranked}  # NaN is null in both
    assert client.get("/api/pairs/1/999").status_code == client.get("/api/pairs/2/999").status_code == 404


def test_prompts_of_the_pool_by_pages(client, run):
    folder = run[0] / "pool"
    assert client.get("/api/prompts").json() == {"prompts": [], "total": 0, "next": None}
    rows = [
        Prompt(
            prompt_id=f"{i:016x}", messages=[{"role": "user", "content": f"question {i}"}], prompt_ids=[1] * i, source="a.jsonl",
            split="heldout" if i == 1 else "train", meta={"answer": "secret"} if i == 1 else {},
        )
        for i in range(5)
    ]  # fmt: skip
    folder.mkdir()
    tables.write_rows(folder / "pool.parquet", rows, Prompt)
    later = [dataclasses.replace(p, prompt_id=f"{p.prompt_id}0", parent=p.prompt_id, joined=4) for p in rows[:2]]
    write_added(folder, later)
    first = client.get("/api/prompts", params={"limit": 2}).json()
    assert (first["total"], first["next"]) == (7, 2)
    assert first["prompts"][1] == {
        "number": 1, "prompt_id": f"{1:016x}", "messages": rows[1].messages, "tokens": 1, "split": "heldout", "source": "a.jsonl",
        "parent": None, "joined": None,
    }  # fmt: skip
    assert "secret" not in client.get("/api/prompts").text
    middle = client.get("/api/prompts", params={"limit": 3, "after": 4}).json()
    assert [(p["number"], p["parent"], p["joined"]) for p in middle["prompts"]] == [
        (4, None, None), (5, rows[0].prompt_id, 4), (6, rows[1].prompt_id, 4),
    ]  # fmt: skip
    assert middle["next"] is None and client.get("/api/prompts", params={"after": 99}).json()["prompts"] == []
    assert client.get("/api/prompts", params={"after": -1}).status_code == 422


def test_policies_events_and_orders(client):
    policies = client.get("/api/policies").json()
    assert [(p["version"], p["state"], p["current"]) for p in policies][:2] == [
        (5, "promoted", True),
        (4, "rejected", False),
    ]
    assert client.get("/api/policies", params={"limit": 2}).json() == policies[:2]
    assert client.get("/api/policies", params={"before": 4}).json() == policies[2:] != []
    events = client.get("/api/events", params={"limit": 3}).json()
    assert [e["kind"] for e in events] == ["order_done", "order_given", "warning"]
    older = client.get("/api/events", params={"limit": 1, "before": events[-1]["id"]}).json()
    assert older[0]["kind"] == "engine_restart" and HOSTILE in older[0]["text"]
    assert [e["round"] for e in client.get("/api/events", params={"round": 3}).json()] == [3]
    assert [(o["kind"], o["state"]) for o in client.get("/api/orders", params={"state": "done"}).json()] == [
        ("pin", "done")
    ]


@pytest.mark.parametrize(
    ("path", "body", "kind", "arguments"),
    [
        ("/api/orders/run", {}, "run", {}), ("/api/orders/pause", {}, "pause", {"after": "round"}),
        ("/api/orders/pause", {"after": "stage"}, "pause", {"after": "stage"}), ("/api/orders/resume", {}, "resume", {}),
        ("/api/orders/cancel", {}, "cancel", {}), ("/api/orders/rollback", {"version": 2}, "rollback", {"version": 2}),
        ("/api/orders/pin", {"version": 2, "pinned": False}, "pin", {"version": 2, "pinned": False}), ("/api/reload", {}, "reload", {}),
        ("/api/prompts", {"rows": [{"prompt": "a"}]}, "add_prompts", {"rows": [{"prompt": "a"}]}),
    ],
)  # fmt: skip
def test_each_order_is_left_in_the_ledger(client, run, path, body, kind, arguments):
    status, given = give(client, path, body)
    assert status == 202
    store = Store(run[0])
    row = waiting(store)[-1]
    store.close()
    assert (row["id"], row["kind"], row["arguments"], row["origin"]) == (given["order"], kind, arguments, "api")


def test_orders_that_cannot_be(client, run, monkeypatch):
    assert give(client, "/api/orders/pause", {"after": "lunch"})[0] == 422
    status, problem = give(client, "/api/orders/pause", {"aftr": "stage"})
    assert status == 422 and "body.aftr" in problem["detail"]
    assert (
        give(client, "/api/orders/rollback", {})[0] == give(client, "/api/orders/rollback", {"version": -1})[0] == 422
    )
    for odd in ({"version": True}, {"version": "1"}, {"version": 1, "pinned": "no"}):  # no policy is to be guessed
        assert give(client, "/api/orders/pin", odd)[0] == 422
    status, problem = give(client, "/api/orders/rollback", {"version": 10**30})
    assert status == 409 and problem["hint"]
    assert give(client, "/api/prompts", {"rows": []})[0] == 422
    assert client.get("/api/orders/pause").status_code == 405
    assert client.post("/api/orders/lunch", json={}).status_code == 404
    headers = {"content-type": "application/json"}
    assert client.post("/api/orders/pause", content=b"{", headers=headers).status_code == 422
    assert client.post("/api/orders/pause", content=b"\xff", headers=headers).status_code in (400, 422)
    assert client.post("/api/orders/pause", content=b"[" * 60_000, headers=headers).status_code in (400, 422)
    for row in (
        b'{"prompt": "\\ud800"}',
        b'{"a": NaN}',
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    ):  # JSON to Python, to no file of ours
        answer = client.post("/api/prompts", content=b'{"rows": [' + row + b"]}", headers=headers)
        assert answer.status_code == 422 and "row 0 cannot be stored" in answer.json()["detail"]
    assert client.post("/api/prompts", content=b"{" + b" " * (8 << 20) + b"}", headers=headers).status_code == 413
    monkeypatch.setattr(views, "MAX_PENDING", 1)
    assert give(client, "/api/orders/resume", {})[0] == 202
    assert give(client, "/api/orders/resume", {})[0] == 429


def test_a_ledger_that_does_not_answer(client, run):
    blocker = sqlite3.connect(run[0] / "ledger.sqlite")
    blocker.execute("BEGIN EXCLUSIVE")
    blocker.execute("DELETE FROM pairs")
    assert client.get("/api/run").status_code == 200  # readers do not wait for a writer
    blocker.rollback()
    blocker.execute("ALTER TABLE rounds RENAME TO gone")
    blocker.commit()
    blocker.close()
    answer = client.get("/api/rounds")
    assert (answer.status_code, answer.json()["detail"]) == (503, "the ledger does not answer")
    assert client.get("/readyz").status_code == 200


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


def test_login_gives_a_cookie_that_scripts_cannot_read(run):
    app = create_app(run[0], config(), run[1], TOKEN, page=False)
    client = TestClient(app, base_url="http://localhost", follow_redirects=False)
    assert client.get("/api/run").status_code == 401
    assert client.get("/login").status_code == 200 and "WRONG" not in client.get("/login").text
    wrong = client.post("/login", data={"token": "wrong"})
    assert wrong.status_code == 403 and "not the token" in wrong.text and "set-cookie" not in wrong.headers
    right = client.post("/login", data={"token": TOKEN})
    cookie = right.headers["set-cookie"]
    assert right.status_code == 303 and "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert client.get("/api/run").status_code == 200
    assert client.post("/login", content=b"x" * 70_000).status_code == 413
    value = client.cookies.get(cookie.partition("=")[0])
    assert client.post("/logout").status_code == 303
    assert client.get("/api/run").status_code == 401
    kept = {"cookie": f"{cookie.partition('=')[0]}={value}"}
    assert value and client.get("/api/run", headers=kept).status_code == 401  # who has kept it is logged out too


def test_a_form_that_is_none_of_the_page_is_a_bad_request(run):
    client = TestClient(create_app(run[0], config(), run[1], TOKEN, page=False), base_url="http://localhost")
    form = {"content-type": "application/x-www-form-urlencoded"}
    for body in ("a=1&b=2&c=3&d=4&token=x", f"token={TOKEN}&token={TOKEN}", "", "token", "a=b", "token=%ff", "&" * 9):
        answer = client.post("/login", content=body, headers=form)
        assert (answer.status_code, "not the form" in answer.text) == (400, True) or body == "token", body
    assert client.post("/login", content="token=é".encode(), headers=form).status_code == 400
    assert client.post("/login", json={"token": TOKEN}).status_code == 400
    assert client.post("/login", files={"token": TOKEN}).status_code == 400
    answer = client.post("/login", content="token=", headers=form)
    assert answer.status_code == 403 and "script-src" not in answer.headers["content-security-policy"]
    assert "style-src 'sha256-" in answer.headers["content-security-policy"]


def test_an_address_may_try_some_tokens_in_a_minute(run, monkeypatch, caplog):
    monkeypatch.setattr(login, "WRONG_SECONDS", 0)
    app = create_app(run[0], config(), run[1], TOKEN, page=False)
    one, other = (TestClient(app, base_url="http://localhost", client=(host, 1)) for host in ("10.0.0.1", "x\ny\t"))
    for _ in range(attempts.MOST):
        assert one.post("/login", data={"token": "wrong"}).status_code == 403
    refused = one.post("/login", data={"token": TOKEN})  # even the right one: it would tell which one is right
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
    assert other.post("/login", data={"token": "wrong"}).status_code == 403
    assert "from 10.0.0.1" in caplog.text and "from an address that is none" in caplog.text
    started = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: started + 61)
    assert one.post("/login", data={"token": TOKEN}, follow_redirects=False).status_code == 303


def test_the_token_is_nowhere_to_be_found(run, caplog, monkeypatch):
    monkeypatch.setenv("SELFPLAY_TOKEN", TOKEN)
    settings = config("service.host=0.0.0.0")
    client = TestClient(
        create_app(run[0], settings, run[1], read_token(settings.service), page=False), base_url="http://localhost"
    )
    client.headers["authorization"] = f"Bearer {TOKEN}"
    for path in ("/api/run", "/metrics", "/api/openapi.json", "/login", "/api/rounds/zzz"):
        assert TOKEN not in client.get(path).text
    client.post("/login", data={"token": TOKEN + "x"})
    assert give(client, "/api/orders/resume", {})[0] == 202
    assert TOKEN not in caplog.text
    assert all(TOKEN.encode() not in path.read_bytes() for path in run[0].rglob("*") if path.is_file())


def test_an_app_that_others_can_reach_is_not_made_without_a_token(run):
    with pytest.raises(ConfigError, match="there is no token"):
        create_app(run[0], config("service.host=0.0.0.0"), run[1], None, page=False)


def test_answers_are_small_on_the_wire_where_others_can_reach_them(run):
    for host, expected in (("127.0.0.1", None), ("0.0.0.0", "gzip")):
        token = None if expected is None else TOKEN
        client = TestClient(
            create_app(run[0], config(f"service.host={host}"), run[1], token, page=False), base_url="http://localhost"
        )
        answer = client.get("/api/pairs", headers={"authorization": f"Bearer {TOKEN}", "accept-encoding": "gzip"})
        assert (answer.status_code, answer.headers.get("content-encoding")) == (200, expected)


@pytest.fixture
def served(run):
    """The app on a real port."""
    app = create_app(run[0], config(), run[1], None, page=False)
    server, port = serve_in_thread(app, ServiceConfig(port=0))
    yield run[0], f"http://127.0.0.1:{port}"
    server.stop()
    assert not server.thread.is_alive()


def test_events_are_streamed_as_they_happen_and_resumed(served):
    run_dir, base = served
    store = Store(run_dir)
    before = store.events()[-1]["id"]
    found, ready = [], threading.Event()

    def listen():
        with httpx.stream("GET", f"{base}/api/events/stream", timeout=30) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            ready.set()
            for line in stream.iter_lines():
                found.append(line)
                if line == f"id: {before + 2}":
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    assert ready.wait(10)
    time.sleep(0.3)
    store.event("note", "two\nlines \u2028 and <b>", 5)
    store.event("note", "last")
    listener.join(15)
    assert not listener.is_alive()
    data = [json.loads(line.removeprefix("data: ")) for line in found if line.startswith("data: ")]
    assert [(d["id"], d["text"]) for d in data] == [(before + 1, "two\nlines \u2028 and <b>"), (before + 2, "last")]
    for headers, params, expected in (
        ({"last-event-id": str(before + 1)}, {}, before + 2),
        ({}, {"after": before}, before + 1),
        ({"last-event-id": "x"}, {"after": 0}, 1),
    ):
        with httpx.stream("GET", f"{base}/api/events/stream", headers=headers, params=params, timeout=30) as stream:
            assert next(line for line in stream.iter_lines() if line.startswith("id: ")) == f"id: {expected}"
    store.close()


def test_a_server_with_open_streams_stops_in_time(run):
    server, port = serve_in_thread(create_app(run[0], config(), run[1], None, page=False), ServiceConfig(port=0))
    with httpx.stream("GET", f"http://127.0.0.1:{port}/api/events/stream", timeout=30):
        started = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - started < 6
    assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")


def test_a_port_that_is_taken(served, run):
    port = int(served[1].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
        serve_in_thread(create_app(run[0], config(), run[1], None, page=False), ServiceConfig(port=port))
    with pytest.raises(ConfigError, match="no-such-host"):
        serve_in_thread(
            create_app(run[0], config(), run[1], None, page=False), ServiceConfig(host="no-such-host.invalid")
        )


def test_the_description_names_every_answer(client):
    schema = client.get("/api/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation.get("summary") and operation.get("description"), path
            good = next(a for status, a in operation["responses"].items() if status.startswith("2"))
            if path not in ("/metrics", "/api/events/stream"):
                assert good["content"]["application/json"]["schema"], path
    assert schema["components"]["schemas"]["Pause"]["additionalProperties"] is False


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(run, mode):
    """Schemathesis makes requests up from the description, valid and not: no 5xx, and every answer as described."""
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi import checks

    app = create_app(run[0], config(), run[1], None, page=False)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"host": "localhost"})
    promised = [
        schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance,
        checks.content_type_conformance,
    ]  # fmt: skip
    statuses = []
    for found in schema.exclude(path="/api/events/stream").get_all_operations():
        operation = found.ok()
        try:
            cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        except hypothesis.errors.Unsatisfiable:
            continue

        @hypothesis.given(case=cases)
        @hypothesis.settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case):
            answer = case.call(headers={"host": "localhost"})
            statuses.append(answer.status_code)
            case.validate_response(answer, checks=promised)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about it can be invalid
            check()
    good, bad = sum(s < 300 for s in statuses), sum(400 <= s < 500 for s in statuses)
    assert (good if mode == "positive" else bad) > 60, (good, bad)


def test_what_the_controller_imports_stays_small():
    """API and page together, and an app made of them: without torch, and within the memory of a controller."""
    code = (
        "import sys, tempfile, pathlib\n"
        "from selfplay.storage import tables\n"
        "tables.leave_pandas_out()\n"
        "import selfplay.service.daemon\n"
        "from selfplay.web.api import create_app\n"
        "from selfplay.config import load\n"
        "from selfplay.types import Prompt\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "create_app(folder, load('configs/tiny.yaml'), dict, None)\n"
        "tables.write_rows(folder / 'x.parquet', [Prompt(prompt_id='a', messages=[], prompt_ids=[1], split='train')], Prompt)\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6)\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'trl', 'sklearn', 'datasets', 'matplotlib', 'pandas') if m in sys.modules])\n"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout.split("\n")
    assert float(out[0]) < 260 and out[1] == "[]", out
    assert not math.isnan(float(out[0]))
