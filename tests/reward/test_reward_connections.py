"""Which connections a server keeps, and which it closes to have room for others."""

import ipaddress
import resource
from types import SimpleNamespace

import pytest

from reward.serving import connections as kept
from reward.serving import descriptors
from reward.serving.connections import Bounds, Connections, Phase, address_of


class One:
    """A connection that can only be cut."""

    def __init__(self) -> None:
        self.gone = False

    def cut(self) -> None:
        self.gone = True


def enter(connections: Connections, host: str = "127.0.0.1", phase: Phase = Phase.HEAD) -> One:
    one = One()
    assert connections.enter(one, host)
    if phase is not Phase.HEAD:
        connections.turn(one, phase)
    return one


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(is_=1000.0)
    monkeypatch.setattr(kept.time, "monotonic", lambda: now.is_)
    return now


def test_the_one_that_has_said_nothing_for_longest_goes(clock: SimpleNamespace) -> None:
    connections = Connections(Bounds(connections=3, body_bytes=100))
    first, second, body = enter(connections), enter(connections), enter(connections, phase=Phase.BODY)
    clock.is_ += 1
    connections.turn(first, Phase.KEPT)  # it has been answered meanwhile
    enter(connections)
    assert (first.gone, second.gone, body.gone) == (False, True, False)
    clock.is_ += 0.1  # the quiet ones have just come: the body that has been underway for longer goes
    enter(connections)
    assert (first.gone, body.gone) == (False, True)
    connections.leave(second)  # what uvicorn says of it later changes nothing
    connections.turn(second, Phase.BUSY)
    assert len(connections) == 3


def test_requests_that_are_answered_stay_and_leave_room_for_short_ones() -> None:
    connections = Connections(Bounds(connections=16, body_bytes=100))
    busy = [enter(connections, phase=Phase.BUSY) for _ in range(14)]
    assert not connections.full
    busy.append(enter(connections, phase=Phase.BUSY))
    assert connections.full  # two places of 16 are for those who ask for little
    busy.append(enter(connections, phase=Phase.BUSY))
    assert not connections.enter(One(), "127.0.0.1")
    assert not any(one.gone for one in busy)
    connections.leave(busy[0])
    assert connections.enter(One(), "127.0.0.1")


def test_one_address_cannot_have_all_places() -> None:
    proxies = [ipaddress.ip_network("10.1.0.0/16")]
    connections = Connections(Bounds(connections=16, body_bytes=100, proxies=proxies))
    greedy = [enter(connections, host) for host in ("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1", "10.0.0.1")]
    other = enter(connections, "10.0.0.2")
    greedy.append(enter(connections, "10.0.0.1"))  # it gives up one of its own
    assert [one.gone for one in greedy] == [True, False, False, False, False] and not other.gone
    for host in ("127.0.0.1", "::1", "10.1.2.3"):
        assert not any(enter(connections, host).gone for _ in range(3))
    few = Connections(Bounds(connections=8, body_bytes=100))
    for suffix in ("1", "2:2"):
        enter(few, f"2001:db8::{suffix}", Phase.BUSY)
    assert not few.enter(One(), "2001:db8::3:3:3")  # another address of the same network
    assert address_of("fe80::1%eth0") == "fe80::/64" and address_of("x") == "x"


def test_bodies_together_are_bounded_and_the_slowest_goes() -> None:
    connections = Connections(Bounds(connections=9, body_bytes=100))
    slow, quick = enter(connections, phase=Phase.BODY), enter(connections, phase=Phase.BODY)
    connections.came(slow, 60)
    connections.came(quick, 40)
    assert not slow.gone
    connections.came(quick, 1)
    assert slow.gone and not quick.gone
    connections.came(slow, 60)  # was underway
    connections.came(quick, 59)
    assert not quick.gone
    connections.turn(quick, Phase.BUSY)  # whole now
    connections.came(enter(connections, phase=Phase.BODY), 100)
    alone = Connections(Bounds(connections=9, body_bytes=100))
    large = enter(alone, phase=Phase.BODY)
    alone.came(large, 1000)  # the app says how large a body may be
    assert not large.gone
    assert not quick.gone and connections.closed == {"too many bytes of bodies": 1}


def test_descriptors_are_kept_for_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (256, 1024, 4096, descriptors.MOST):
        places, backlog = descriptors.share(512, limit)
        assert places >= 8 and backlog >= 8
        assert limit < 1024 or places + 2 * backlog + descriptors.OWN <= limit
    assert descriptors.share(512, descriptors.MOST) == (512, 1024)
    for before, expected in (
        ((1024, 4096), 4096),
        ((4096, 4096), 4096),  # as a child has it, whose parent has raised it
        ((1024, resource.RLIM_INFINITY), 65_536),
        ((1 << 20, 1 << 20), 65_536),
    ):
        found = list(before)
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=found: tuple(found))
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits, found=found: found.__setitem__(0, limits[0]))
        assert descriptors.raise_limit() == expected and found[0] >= expected
