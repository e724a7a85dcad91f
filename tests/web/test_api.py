import dataclasses
import json
import os
import sqlite3
import time

import pytest
from served_world import HOSTILE, Progress, build, config
from starlette.testclient import TestClient
from test_api_orders import give

from selfplay.config import RetentionConfig
from selfplay.errors import ConfigError
from selfplay.prompts.pool import write_added
from selfplay.storage import retention, tables
from selfplay.storage.ledger import Store
from selfplay.types import Prompt
from selfplay.web import attempts, login
from selfplay.web.access import read_token
from selfplay.web.api import create_app

pytestmark = pytest.mark.service

TOKEN = "correct horse battery staple"


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
