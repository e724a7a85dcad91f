"""What a run does now, in lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from selfplay.storage import paging
from selfplay.storage.ledger import Store
from selfplay.visible import when


def lines(store: Store, alive: bool) -> Iterator[str]:
    """Service, last round, policy, what waits and what happened last. alive: whether the service's process is there."""
    service: dict[str, Any] = store.state("service") or {}
    state = service.get("state", "never served") if alive or service.get("state") in (None, "stopped") else "dead"
    why = service.get("why", "")
    if state == "waiting" and why[:4].isdigit():  # the time at which the next round starts
        why = f"until {when(why)}"
    yield f"service  {state}" + (f": {why}" if why else "")
    if alive:
        yield f"process  {service['pid']}, in this state since {when(service['since'])}"
    for last in store.last_rounds(1):
        done = ", ".join(store.seconds(last["round"])) or "nothing yet"
        yield f"round    {last['round']} {last['state']} (stages done: {done})"
    current = store.serving() or 0
    promoted = store.count_rounds().get("promoted", 0)
    yield f"policy   {current} serves; {promoted} {'round was' if promoted == 1 else 'rounds were'} promoted"
    if trouble := store.state("webhook"):
        yield f"alerts   {trouble}"
    for order in store.pending():
        yield f"order    {order['id']} {order['kind']} waits since {when(order['time'])}"
    for event in reversed(paging.events(store, limit=3)):
        yield f"event    {when(event['time'])} {event['kind']}: {event['text']}"
