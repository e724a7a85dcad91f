"""What has to hold at the moment that the service decides something: seen where it does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from selfplay.storage import agreement
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.policies import Policies
from selfplay.storage.reader import CURRENT
from simulation.processes import WEIGHTS
from simulation.threads import CLOCK
from simulation.world import Violation


def must(holds: object, text: str) -> None:
    """Raises Violation unless it holds."""
    if not holds:
        raise Violation(text)


def set_current(real: Callable[..., None]) -> Callable[..., None]:
    def checked(store: Store, policies: Policies, version: int) -> None:
        world = CLOCK.world
        if store.state(CURRENT) is not None:  # the first is policy 0, before there is an engine
            must(world.daemon is not None and world.daemon.run is not None, "a policy is changed without a run")
            generator: Any = world.daemon.run.generator  # type: ignore[union-attr]
            # Where a rejected candidate left the engine dead, it starts with the one that is current still.
            shown = version if generator.shown is None and store.serving() == version else generator.shown
            must(shown == version, f"policy {version} becomes current, but no engine was shown to serve it")
            wanted = (Path(policies.get(version).path) / WEIGHTS).read_text()
            must(generator.weights in (wanted, None), f"policy {version} becomes current, and other weights are served")
        real(store, policies, version)
        world.tell(f"policy {version} is current")

    return checked


def open_round(real: Callable[..., None]) -> Callable[..., None]:
    def checked(store: Store, index: int, champion: int, *rest: Any) -> None:
        world = CLOCK.world
        world.active = False
        there = store.rounds()
        must(index == len(there) + 1, f"round {index} follows {len(there)} rounds")
        must(not [row for row in there if row["state"] == "running"], f"round {index} opens beside an open one")
        must(not store.state("pause"), f"round {index} opens in a pause")
        must(store.serving() == champion, f"round {index} begins with policy {champion}, which does not serve")
        run_now = index <= store.state("run_now", 0)
        schedule = world.daemon.config.schedule if world.daemon else None
        if there and schedule and schedule.every_minutes and not run_now and not world.jumped:
            since = world.monotonic - world.opened.get(index - 1, -1e9)
            must(since >= schedule.every_minutes * 60 - 1, f"round {index} starts {since:.0f} s after the one before")
        if run_now:
            world.by_order.add(index)
            (given,) = store.query("SELECT COUNT(*) AS count FROM orders WHERE kind = 'run'")
            must(len(world.by_order) <= given["count"], f"rounds {sorted(world.by_order)} for {given['count']} orders")
        world.active = True
        real(store, index, champion, *rest)
        world.opened[index] = world.monotonic
        world.tell(f"round {index} opens, policy {champion} serves")

    return checked


def close_round(real: Callable[..., None]) -> Callable[..., None]:
    def checked(store: Store, index: int, state: str, policy: int, *rest: Any) -> None:
        world = CLOCK.world
        world.active = False
        must(store.round(index)["state"] == "running", f"round {index} is closed twice")
        world.active = True
        real(store, index, state, policy, *rest)
        world.tell(f"round {index} is closed: {state}, policy {policy}")

    return checked


def answer(real: Callable[..., None]) -> Callable[..., None]:
    def checked(store: Store, number: int, state: str, result: str) -> None:
        world = CLOCK.world
        world.active = False
        order = store.order(number)
        must(order["state"] == "pending", f"order {number} ({order['kind']}) is answered twice")
        promised = store.state("run_now", 0) if order["kind"] == "run" and state == "done" else None
        must(promised is None or promised > store.last_round(), f"order {number} is obeyed, and no round follows it")
        world.active = True
        real(store, number, state, result)
        if promised is not None:
            world.promised[number] = promised

    return checked


def enter(real: Callable[[RunLock], RunLock]) -> Callable[[RunLock], RunLock]:
    def remembered(lock: RunLock) -> RunLock:
        CLOCK.world.locks.append(lock)
        return real(lock)

    return remembered


@contextlib.contextmanager
def tapped() -> Iterator[None]:
    with (
        patch.object(agreement, "set_current", set_current(agreement.set_current)),
        patch.object(RunLock, "__enter__", enter(RunLock.__enter__)),
        patch.object(Store, "open_round", open_round(Store.open_round)),
        patch.object(Store, "answer", answer(Store.answer)),
        patch.object(Store, "close_round", close_round(Store.close_round)),
    ):
        yield
