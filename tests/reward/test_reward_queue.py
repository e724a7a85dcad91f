"""The bounded queue of the reward server, around scorers that wait to be told."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reward.app import build_app
from reward.faults import RewardRefused, RewardUnavailable
from reward.openrlhf import Unrender
from reward.schema import Health, Item
from reward.scorer import Score, Stopped


class Waiting:
    """A scorer that scores when `go` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.stopping, self.go = threading.Event(), threading.Event()
        self.counts: Counter[str] = Counter(seen=0)
        self.error, self.running = error, 0
        self.health = Health(
            model="fake", parameters=0, dtype="none", device="cpu", max_tokens=9, weights_sha256="a", template_sha256="b", files={}
        )  # fmt: skip

    def score(self, items: Sequence[Item]) -> list[Score]:
        self.running += 1
        self.counts["seen"] += len(items)
        assert self.go.wait(30)
        if self.error:
            raise self.error
        return [Score(value=float(len(i.response))) for i in items]


def serve(*scorers: Waiting, places: int) -> TestClient:
    app = build_app(scorers, max_body=2**20, max_items=9, max_waiting=places, unrender=Unrender(None))
    return TestClient(app)


def ask(client: TestClient, response: str = "abc") -> Any:
    return client.post(
        "/score", json={"items": [{"messages": [{"role": "user", "content": "?"}], "response": response}]}
    )


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def value(client: TestClient, line: str) -> float:
    (found,) = [t for t in client.get("/metrics").text.splitlines() if t.startswith(line + " ")]
    return float(found.split()[-1])


def test_what_has_no_place_is_told_when_to_ask_again() -> None:
    one, two = Waiting(), Waiting()
    with serve(one, two, places=1) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, client) for _ in range(3)]
        until(lambda: one.running + two.running == 2 and value(client, "reward_requests_inside") == 3)
        refused = ask(client)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert client.get("/healthz").status_code == 200  # it is busy, not ill
        one.go.set()
        two.go.set()
        assert [a.result().json()["scores"] for a in asked] == [[3.0]] * 3
        assert ask(client).status_code == 200
        assert value(client, 'reward_requests_total{path="/score",status="429"}') == 1
        assert value(client, 'reward_items_total{result="scored"}') == 4
        assert value(client, 'reward_scorer_total{what="seen"}') == 4
        assert value(client, "reward_requests_inside") == 0
        assert value(client, "reward_workers") == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("out of memory"), 500),
        (Stopped(), 503),
        (RewardUnavailable("down"), 503),
        (RewardRefused("wrong key"), 424),
    ],
)
def test_a_failure_gives_its_place_and_its_scorer_back(error: Exception, code: int) -> None:
    scorer = Waiting(error)
    scorer.go.set()
    with serve(scorer, places=1) as client:
        for _ in range(4):
            assert ask(client).status_code == code
        scorer.error = None
        assert ask(client).json()["scores"] == [3.0]
