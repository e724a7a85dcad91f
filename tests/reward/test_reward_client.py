import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from fake_reward import EXPECTED, FAULTS, ITEMS, QUICK, Answer, fake, right, score_of, send, status

from reward.client import RewardClient, RewardRefused, RewardUnavailable


def test_scores_in_order_over_kept_connections_and_bounded_requests() -> None:
    def unhurried(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        time.sleep(0.02 if asked["items"][0]["response"] == "answer 0" else 0.005)  # the first comes last
        right(handler, asked)

    done: list[int] = []
    with fake(default=unhurried) as server, RewardClient(server.url + "/", batch_size=1, concurrency=2) as client:
        assert client.score(ITEMS, on_progress=done.append) == EXPECTED
        assert client.score(ITEMS[:3]) == EXPECTED[:3]
        assert (server.most_running, len(server.connections)) == (2, 2)
    assert done == list(range(1, 11))
    assert {a["path"] for a in server.asked} == {"/score"}
    assert ITEMS[0][0] in [a["items"][0]["messages"] for a in server.asked]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_and_every_score_is_right(name: str) -> None:
    late = name in ("slow", "dripping")
    with fake(FAULTS[name]) as server, RewardClient(server.url, **QUICK | {"timeout": 1.0 if late else 30.0}) as client:
        assert client.score(ITEMS) == EXPECTED
        assert len(server.asked) == 4 or late  # three chunks, one of them twice


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_an_outage(name: str) -> None:
    with fake(default=FAULTS[name]) as server:
        client = RewardClient(server.url, **QUICK | {"timeout": 0.2, "deadline": 0.5})
        began = time.monotonic()
        with pytest.raises(
            RewardUnavailable, match=r"no usable answer from the reward server at http.*run the same command"
        ):
            client.score(ITEMS)
        assert time.monotonic() - began < 5
        assert len(server.asked) > 1


def test_a_server_that_is_down_is_an_outage_and_says_what_to_do() -> None:
    with fake() as server:
        url = server.url
    began = time.monotonic()
    with pytest.raises(RewardUnavailable, match=r"ConnectError.*Look at its log, start it again"):
        RewardClient(url, **QUICK | {"deadline": 0.5}).score(ITEMS)
    assert 0.3 < time.monotonic() - began < 5


def test_a_server_that_comes_back_is_a_pause() -> None:
    with fake() as first:
        port = first.server_address[1]
    scores: list[float | None] = []
    thread = threading.Thread(target=lambda: scores.extend(RewardClient(first.url, **QUICK).score(ITEMS)))
    thread.start()
    time.sleep(0.3)
    assert not scores
    with fake(port=port):
        thread.join()
    assert scores == EXPECTED


def test_retry_after_is_heeded() -> None:
    with fake(status(429, retry_after="1")) as server:
        began = time.monotonic()
        assert RewardClient(server.url, **QUICK).score(ITEMS[:1]) == [0.0]
        assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("code", [301, 400, 401, 404, 422])
def test_a_refusal_is_an_error_at_once(code: int) -> None:
    with fake(default=status(code, b'{"error": "not a score request"}', location="/x")) as server:
        with pytest.raises(RewardRefused, match=rf"HTTP {code}.*not a score request"):
            RewardClient(server.url, **QUICK).score(ITEMS[:2])
        assert len(server.asked) == 1


def test_a_number_that_is_not_finite_is_a_bad_item() -> None:
    content = b'{"scores": [NaN, 1.5, Infinity, null, -1e999, 7], "errors": [null, null, null, "too long", null, null]}'
    with fake(status(200, content)) as server, RewardClient(server.url, **QUICK | {"batch_size": 6}) as client:
        assert client.score(ITEMS[:6]) == [None, 1.5, None, None, None, 7.0]
        assert client.reasons == {"the score is nan": 1, "the score is inf": 1, "the score is -inf": 1, "too long": 1}


def test_a_bare_list_of_scores_is_enough() -> None:
    with fake(status(200, b'{"scores": [0, 0.5]}')) as server:
        assert RewardClient(server.url, **QUICK).score(ITEMS[:2]) == [0.0, 0.5]


def test_a_text_that_is_no_text_is_a_bad_item_and_not_sent() -> None:
    items = [ITEMS[0], (ITEMS[1][0], "\ud800"), ITEMS[2]]
    done: list[int] = []
    with fake() as server, RewardClient(server.url, **QUICK) as client:
        assert client.score(items, on_progress=done.append) == [0.0, None, 1.0]
        assert client.score(items[1:2]) == [None]
        assert [len(a["items"]) for a in server.asked] == [2]
    assert done == [3]


def test_what_is_no_conversation_is_named() -> None:
    for item in (([], "a"), ([{"role": "user"}], "a"), ([{"role": "user", "content": "a"}], None)):
        with pytest.raises(ValueError, match="item 1 is no conversation"):
            RewardClient("http://127.0.0.1:9").score([ITEMS[0], item])


def test_requests_are_split_where_the_server_wants_less() -> None:
    def at_most_two(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        huge = any(item["response"].startswith("huge") for item in asked["items"])
        if huge or len(asked["items"]) > 2:
            send(handler, 413, b"too much")
        else:
            right(handler, asked)

    items = [*ITEMS[:5], (ITEMS[5][0], "huge 5"), *ITEMS[6:]]
    with fake(default=at_most_two) as server, RewardClient(server.url, **QUICK | {"batch_size": 10}) as client:
        assert client.score(items) == [*EXPECTED[:5], None, *EXPECTED[6:]]
        assert client.reasons == {"HTTP 413: too much": 1}


def test_requests_are_bounded_in_bytes_too() -> None:
    with fake() as server, RewardClient(server.url, **QUICK | {"batch_bytes": 240, "batch_size": 100}) as client:
        assert client.score(ITEMS) == EXPECTED
        assert {len(a["items"]) for a in server.asked} == {2}


def test_several_servers_share_the_work_and_stand_in_for_each_other() -> None:
    with fake() as first, fake() as second, fake() as gone:
        urls = [first.url, second.url]
        assert RewardClient(urls, **QUICK | {"batch_size": 1}).score(ITEMS) == EXPECTED
        assert len(first.asked) + len(second.asked) == 10
        assert min(len(first.asked), len(second.asked)) >= 2
        gone.server_close()
        assert RewardClient([gone.url, second.url], **QUICK).score(ITEMS) == EXPECTED


def test_the_less_busy_server_gets_the_next_request() -> None:
    def unhurried(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        time.sleep(1.0)
        right(handler, asked)

    with fake(default=unhurried) as slow_one, fake() as quick_one:
        client = RewardClient([slow_one.url, quick_one.url], **QUICK | {"batch_size": 1, "concurrency": 2})
        assert client.score(ITEMS) == EXPECTED
        assert len(slow_one.asked) <= 3  # of ten: one at a time, a second each


@pytest.mark.slow
def test_a_server_that_fails_again_and_again_rests_and_returns() -> None:
    with fake(default=status(500)) as ill, fake() as well:
        client = RewardClient([ill.url, well.url], **QUICK | {"batch_size": 1, "first_wait": 0.2, "longest_wait": 0.2})
        began = time.monotonic()
        for _ in range(5):
            assert client.score(ITEMS) == EXPECTED
        # three faults open its breaker, at most three more were on their way; then one for each rest of at least 0.15 s
        assert 3 <= len(ill.asked) <= 6 + (time.monotonic() - began) / 0.15
        ill.default = right
        time.sleep(0.3)
        before = len(ill.asked)
        client.score(ITEMS)
        client.score(ITEMS)
        assert len(ill.asked) > before + 1


def test_a_busy_server_is_left_alone_while_another_one_has_time() -> None:
    with fake(default=status(429, retry_after="5")) as busy, fake() as idle:
        began = time.monotonic()
        client = RewardClient([busy.url, idle.url], **QUICK | {"batch_size": 1})
        assert client.score(ITEMS) == EXPECTED
        assert time.monotonic() - began < 4
        assert len(busy.asked) <= 4  # no more than were on their way with the first one


def test_answers_to_one_prompt_stay_in_one_request() -> None:
    items = [(ITEMS[n // 3][0], f"answer {n}") for n in range(12)]
    with fake() as server, RewardClient(server.url, **QUICK | {"batch_size": 4}) as client:
        assert client.score(items) == [n / 2 for n in range(12)]
        assert [len(a["items"]) for a in server.asked] == [3] * 4
    with fake() as server, RewardClient(server.url, **QUICK | {"batch_size": 2}) as client:
        assert client.score(items) == [n / 2 for n in range(12)]  # too many for one request: split


def test_references_travel_with_their_items() -> None:
    with fake() as server, RewardClient(server.url, **QUICK) as client:
        client.score(ITEMS[:2], references=["Paris", None])
        assert [i.get("reference") for i in server.asked[0]["items"]] == ["Paris", None]


def test_scores_of_two_models_are_never_mixed() -> None:
    def by(name: str) -> Answer:
        def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
            scores = [score_of(item) for item in asked["items"]]
            send(handler, 200, json.dumps({"scores": scores, "weights_sha256": name}).encode())

        return answer

    with fake(by("one"), default=by("two")) as server, pytest.raises(RewardRefused, match="2 different models"):
        RewardClient(server.url, **QUICK).score(ITEMS)


def test_a_service_without_healthz_has_no_name() -> None:
    with fake() as server, RewardClient(server.url, **QUICK) as client:
        server.health_status = 404
        assert client.health().weights_sha256 == "" and client.score(ITEMS) == EXPECTED
        server.health_status = 403
        with pytest.raises(RewardRefused, match="403"):
            client.health()


def test_one_address_of_two_without_healthz_does_not_take_the_other_ones_name() -> None:
    with fake() as server, fake() as other, RewardClient([server.url, other.url], **QUICK) as client:
        other.health_status = 404
        with pytest.raises(RewardRefused, match="serve different models: m and a model that it does not name"):
            client.health()
        server.health_status = 404
        assert client.health().weights_sha256 == ""


def test_one_of_two_addresses_is_down_and_the_other_serves() -> None:
    began = time.monotonic()
    with fake() as server, fake() as other:
        with RewardClient(["http://127.0.0.1:9", server.url], **QUICK) as client:
            for _ in range(5):
                assert client.health().weights_sha256 == "one"
                assert client.score(ITEMS) == EXPECTED
        other.weights = "two"
        client = RewardClient([server.url, other.url], **QUICK)
        with pytest.raises(RewardRefused, match="serve different models"):
            client.health()
    assert time.monotonic() - began < 20
    client = RewardClient("http://127.0.0.1:9", **QUICK | {"deadline": 0.3})
    with pytest.raises(RewardUnavailable, match="no usable answer"):
        client.health()


def test_an_outage_does_not_wait_for_requests_in_flight() -> None:
    def first_fails(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if asked["items"][0]["response"] == "answer 0":
            send(handler, 400, b"no")
        else:
            time.sleep(10)

    with fake(default=first_fails) as server:
        began = time.monotonic()
        with pytest.raises(RewardRefused):
            RewardClient(server.url, **QUICK).score(ITEMS)
        assert time.monotonic() - began < 5


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with fake() as server:
        assert RewardClient(server.url, **QUICK).score(ITEMS) == EXPECTED


@pytest.mark.parametrize("url", ["", "127.0.0.1:8100", [], ["http://a", "ftp://b"], "http://", "http://a:99999"])
def test_an_address_that_is_none_is_refused(url: Any) -> None:
    with pytest.raises(ValueError, match="address of a reward server"):
        RewardClient(url)


def test_sizes_and_times_are_checked() -> None:
    for wrong in ({"batch_size": 0}, {"concurrency": 0}, {"timeout": 0.0}, {"deadline": -1.0}, {"first_wait": -0.1}):
        with pytest.raises(ValueError, match="must be positive"):
            RewardClient("http://127.0.0.1:9", **wrong)


@pytest.mark.slow
def test_the_client_needs_no_torch() -> None:
    code = "import sys, reward.client; print({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
