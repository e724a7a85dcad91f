"""Orders that are given over HTTP."""

import pytest
from daemon_world import waiting

from selfplay.storage.ledger import Store
from selfplay.web import view as views

pytestmark = pytest.mark.service


def give(client, path, body):
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


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
