import random
import threading
import time

import pytest
import tenacity

from reward.channel import Channel
from reward.endpoints import BREAKS, Endpoint, Endpoints


def two(rest: float = 60.0) -> tuple[Endpoints, Endpoint, Endpoint]:
    endpoints = Endpoints(["a", "b"], first_rest=rest, longest_rest=rest)
    return endpoints, *endpoints.all


def test_the_least_busy_one_is_chosen_and_equals_take_turns() -> None:
    endpoints, a, b = two()
    with endpoints.use(endpoints.all) as first, endpoints.use(endpoints.all) as second:
        assert {first.url, second.url} == {"a", "b"}
    with (
        endpoints.use([a]),
        endpoints.use(endpoints.all) as other,
        endpoints.use([b]),
        endpoints.use(endpoints.all) as third,
    ):
        assert other is b
        assert third is a
    assert (a.in_flight, b.in_flight) == (0, 0)


def test_three_faults_in_a_row_break_and_a_success_in_between_does_not() -> None:
    endpoints, a, _ = two()
    for n in range(BREAKS - 1):
        with pytest.raises(OSError), endpoints.use([a]):
            endpoints.failed(a, 0.0, time.monotonic())
            raise OSError(n)
    assert not a.broken
    with endpoints.use([a]):
        pass
    assert a.failures == 0
    for _ in range(BREAKS):
        endpoints.failed(a, 0.0, time.monotonic())
    assert a.broken
    assert 40 < endpoints.pause([a]) <= 75
    assert endpoints.pause(endpoints.all) == 0
    for _ in range(5):
        with endpoints.use(endpoints.all) as chosen:
            assert chosen.url == "b"


def test_a_rested_one_is_tried_by_one_request_at_a_time_and_closes() -> None:
    endpoints, a, b = two(rest=0.01)
    for _ in range(BREAKS):
        endpoints.failed(a, 0.0, time.monotonic())
    time.sleep(0.05)
    with endpoints.use(endpoints.all) as probe:
        assert probe is a
        for _ in range(3):
            with endpoints.use(endpoints.all) as meanwhile:
                assert meanwhile is b
    assert not a.broken


def test_where_all_rest_the_first_to_be_rested_is_taken() -> None:
    endpoints, a, b = two()
    endpoints.busy(a, 5.0)
    endpoints.busy(b, 9.0)
    assert 4 < endpoints.pause(endpoints.all) <= 5
    with endpoints.use(endpoints.all) as chosen:
        assert chosen is a
    assert not a.broken and not b.broken  # busy is no fault


def test_requests_that_fail_together_are_one_fault() -> None:
    endpoints, a, _ = two()
    began = time.monotonic()
    for _ in range(16):
        endpoints.failed(a, 0.0, began)
    assert a.failures == 1
    endpoints.failed(a, 0.0, time.monotonic())
    assert a.failures == 2


def test_one_request_tries_the_only_address_and_the_others_wait_for_what_comes_of_it() -> None:
    endpoints = Endpoints(["a"], first_rest=0.0, longest_rest=0.0)
    (a,) = endpoints.all
    for _ in range(BREAKS):
        endpoints.failed(a, 0.0, time.monotonic())
    waits, done = threading.Event(), []

    def other() -> None:
        waits.set()
        with endpoints.use([a], until=time.monotonic() + 60):
            done.append(a.broken)

    with endpoints.use([a]):
        thread = threading.Thread(target=other)
        thread.start()
        waits.wait()
        with endpoints.use([a], until=time.monotonic() + 0.2):
            assert not done  # that one's time is over: it is the last attempt of its deadline
    thread.join()
    assert done == [False]


def test_a_question_about_health_closes_no_breaker() -> None:
    endpoints, a, _ = two(rest=0.0)
    for _ in range(BREAKS):
        endpoints.failed(a, 0.0, time.monotonic())
    with endpoints.use([a], closes=False):
        pass
    assert a.broken


def test_those_who_wait_for_longest_do_not_return_together() -> None:
    channel = Channel(
        ["http://a"], what="x", advice="", connections=1, timeout=1, deadline=1, first_wait=0.5, longest_wait=4.0
    )
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.attempt_number = 9
    random.seed(0)
    waits = {channel._jitter(state) for _ in range(9)}
    assert len(waits) == 9 and min(waits) >= 4.0 and max(waits) <= 4.5
