"""Requests of several orders in one vLLM engine: while one order is finished, the engine already works on the next.

An order whose requests are in the engine is in flight. It is answered as soon as the last of its requests is done, whatever
else is in flight. This module runs in the engine's child and does not import vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfplay.generation.orders import OrderError, describe
from selfplay.processes.protocol import Channel, Event

HEARTBEAT = 1.0  # seconds between signs of life


@dataclass(eq=False, slots=True, kw_only=True)
class Flight:
    """The requests of one order."""

    order: Event
    keep: Callable[[Any], Any]
    """What is kept of a finished output. An output has a Python object for each token; made smaller at once, it does not wait for
    the others."""
    finish: Callable[[list[Any]], Any] | None
    """Makes the answer to the order of what was kept, prompt by prompt. None where somebody waits for that itself."""
    ids: list[str]
    """Of the requests inside vLLM."""
    before: int
    total: int
    kept: dict[int, Any] = field(default_factory=dict)
    tokens: int = 0
    told: float
    error: Exception | None = None

    @property
    def numbers(self) -> list[int]:
        """The number of each request, in the order of the prompts. vLLM adds random letters to it inside."""
        return [int(name.partition("-")[0]) for name in self.ids]


class Flights:
    """All orders that are in flight."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._llm: Any = None
        self._of: dict[int, Flight] = {}  # by the number of the request

    @property
    def busy(self) -> bool:
        return bool(self._of)

    def launch(
        self,
        llm: Any,
        order: Event,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        keep: Callable[[Any], Any],
        finish: Callable[[list[Any]], Any] | None = None,
        before: int = 0,
        total: int | None = None,
    ) -> Flight:
        """Give the engine the requests of an order: a prompt and its parameters each.

        Its progress is told now and then, as so many of `total` done. `before` were done earlier.
        """
        self._llm = llm
        ids = llm.enqueue([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        flight = Flight(
            order=order,
            keep=keep,
            finish=finish,
            ids=ids,
            before=before,
            total=len(prompts) if total is None else total,
            told=time.monotonic(),
        )
        self._of |= dict.fromkeys(flight.numbers, flight)
        return flight

    def step(self) -> None:
        """One step of the engine; orders that are done with it are answered."""
        done = []
        for output in self._llm.llm_engine.step():
            flight = self._of.get(int(output.request_id))
            if flight is None or not output.finished:
                continue
            del self._of[int(output.request_id)]
            try:
                flight.kept[int(output.request_id)] = flight.keep(output)
            except Exception as error:
                self._fail(flight, error)
                continue
            flight.tokens += sum(len(completion.token_ids) for completion in output.outputs)
            if len(flight.kept) == len(flight.ids):
                done.append(flight)
        for flight in done:
            self._land(flight)
        for flight in set(self._of.values()):
            if time.monotonic() - flight.told > HEARTBEAT:
                self._tell(flight)
        if self._of and not self._llm.llm_engine.has_unfinished_requests():
            self.fail(OrderError("internal", f"{len(self._of)} requests never came back"))

    def wait(self, flight: Flight) -> list[Any]:
        """Go on until one order is done; returns what was kept of its outputs, in the order of the prompts."""
        try:
            while len(flight.kept) < len(flight.ids) and flight.error is None:
                self.step()
        except BaseException:
            self._abort(flight)
            raise
        if flight.error is not None:
            raise flight.error
        return [flight.kept[number] for number in flight.numbers]

    def drop(self) -> None:
        """Forget every order in flight; none of them is answered."""
        for flight in set(self._of.values()):
            self._abort(flight)

    def fail(self, error: Exception) -> None:
        """Answer every order in flight by an error."""
        for flight in set(self._of.values()):
            self._fail(flight, error)

    def _land(self, flight: Flight) -> None:
        self._tell(flight)
        if flight.finish is None:
            return
        try:
            self._channel.result(flight.order, flight.finish([flight.kept[number] for number in flight.numbers]))
        except Exception as error:
            self._fail(flight, error)

    def _fail(self, flight: Flight, error: Exception) -> None:
        self._abort(flight)
        flight.error = error
        if flight.finish is not None:
            wire = describe(error, flight.order["order"])
            self._channel.error(flight.order, wire.kind, str(wire), wire.hint)

    def _abort(self, flight: Flight) -> None:
        left = {number for number in flight.numbers if self._of.pop(number, None) is not None}
        if left:
            ids = [name for name, number in zip(flight.ids, flight.numbers, strict=True) if number in left]
            self._llm.llm_engine.abort_request(ids, internal=True)

    def _tell(self, flight: Flight) -> None:
        flight.told = time.monotonic()
        done = flight.before + len(flight.kept)
        self._channel.progress(flight.order, done=done, total=flight.total, tokens=flight.tokens)
