"""Work that is dealt out to engines, piece by piece, to whoever is free; several pieces are in flight in each.

All of this runs in the caller's thread. Answers depend on seeds alone, so it does not matter who gives them, or in which
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from selfplay.errors import EngineError, Interrupted
from selfplay.generation.supervised import UNSOUND, SupervisedEngine
from selfplay.processes.child import ChildDied, ChildError, wait_for_any
from selfplay.types import Policy

AT_LEAST = 2  # pieces in flight in each engine, so that it never waits for the slowest answer of one
LISTEN, LOOK = 1.0, 0.1  # seconds to wait for engines that work, and between two looks at those that are started again


@dataclass(eq=False, slots=True, kw_only=True)
class Piece:
    """An order to one engine, whichever it is."""

    order: str
    fields: dict[str, Any]
    policy: Policy
    """Whose weights are to answer."""
    sequences: int
    """How many sequences the engine has to decode or score for it."""
    done: Callable[[Any], None]
    """Takes the answer to the order."""
    progress: Callable[[int], None]
    """Takes how many are done so far, of what the engine counts."""


@dataclass(eq=False, slots=True)
class Seat:
    """An engine and what is in flight in it, by the number of the order."""

    engine: SupervisedEngine
    flying: dict[int, Piece] = field(default_factory=dict)

    @property
    def load(self) -> int:
        return sum(piece.sequences for piece in self.flying.values())

    @property
    def has_room(self) -> bool:
        """Whether it can take another piece. Two keep it busy; where they are small, more of them fill it twice over."""
        full = 2 * self.engine.config.generate.engine.max_num_seqs
        return self.engine.ready and (len(self.flying) < AT_LEAST or self.load < full)


class Keeper(Protocol):
    """Who looks after the engines meanwhile."""

    def look_after(self) -> None:
        """Take in what became of engines that were started again; raises where too few are left."""

    def set_aside(self, engine: SupervisedEngine, error: Exception) -> None:
        """Give an engine up; raises `error` where too few are left."""


class Deal:
    """Some pieces of work, and the engines that do them.

    before: called before a piece is handed out; what it raises ends the work.
    """

    def __init__(
        self,
        engines: Sequence[SupervisedEngine],
        pieces: Iterable[Piece],
        keeper: Keeper,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._seats = [Seat(engine) for engine in engines]
        self._waiting = deque(pieces)
        self._keeper, self._before = keeper, before
        self._stop: Interrupted | None = None

    def run(self) -> list[Piece]:
        """Have the pieces done; returns those for a policy that no engine serves any more.

        After an Interrupted that is not `now` no more pieces are handed out, and those in flight are finished. After anything
        else they are dropped.
        """
        try:
            while self._flying or (self._waiting and self._stop is None):
                self._keeper.look_after()
                self._hand_out()
                if not self._flying and not self._coming and self._stop is None:
                    break
                self._listen()
        except Exception:
            for seat in self._flying:
                _drop(seat)
            raise
        if self._stop is not None:
            raise self._stop
        return list(self._waiting)

    @property
    def _coming(self) -> bool:
        """Whether an engine is being started again that takes some of what is left."""
        wanted = {piece.policy for piece in self._waiting}
        return any(seat.engine.job is not None and seat.engine.wanted in wanted for seat in self._seats)

    @property
    def _flying(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.flying]

    def _hand_out(self) -> None:
        """Give pieces to the engines that have room, the one with the least to do first."""
        while self._stop is None:
            wanted = {piece.policy for piece in self._waiting}
            able = [seat for seat in self._seats if seat.has_room and seat.engine.wanted in wanted]
            if not able:
                return
            seat = min(able, key=lambda seat: (len(seat.flying), seat.load))
            try:
                self._before()
            except Interrupted as stop:
                if stop.now:
                    raise
                self._stop = stop
                return
            piece = next(piece for piece in self._waiting if piece.policy == seat.engine.wanted)
            self._waiting.remove(piece)
            try:
                seat.flying[seat.engine.send(piece.order, **piece.fields)] = piece
            except ChildDied as died:
                self._waiting.appendleft(piece)
                self._lost(seat, died)

    def _listen(self) -> None:
        """Wait until an engine says something, and take it in."""
        seats = self._flying
        coming = any(seat.engine.job is not None for seat in self._seats)
        children = [seat.engine.warm.child for seat in seats]
        wait_for_any([child for child in children if child is not None], LOOK if coming or not seats else LISTEN)
        for seat in seats:
            self._hear(seat)

    def _hear(self, seat: Seat) -> None:
        child = seat.engine.warm.child
        assert child is not None
        try:
            events = child.heard()
        except ChildDied as died:
            self._lost(seat, died)
            return
        for event in events:
            piece = seat.flying.get(event.get("id", 0))
            if piece is None:
                continue
            if "result" in event:
                del seat.flying[event["id"]]
                piece.done(event["result"])
            elif "error" in event:
                self._failed(seat, child.failure(event))
                return
            else:
                piece.progress(event["done"])

    def _lost(self, seat: Seat, died: ChildDied) -> None:
        """An engine died: others take what was in flight in it, and it is started again meanwhile."""
        self._take_back(seat)
        try:
            seat.engine.lost(died)
        except EngineError as error:
            self._keeper.set_aside(seat.engine, error)
        else:
            seat.engine.begin(seat.engine.serve)

    def _failed(self, seat: Seat, error: ChildError) -> None:
        """An order failed. What is wrong with the order is wrong for every engine; what is wrong with the engine is not."""
        if error.kind not in UNSOUND:
            seat.engine.refuse(error)
        self._take_back(seat)
        try:
            seat.engine.refuse(error)
        except EngineError as failure:
            self._keeper.set_aside(seat.engine, failure)

    def _take_back(self, seat: Seat) -> None:
        self._waiting.extendleft(reversed(seat.flying.values()))
        seat.flying.clear()


def _drop(seat: Seat) -> None:
    """Have an engine forget what is in flight in it; one that cannot is ended."""
    seat.flying.clear()
    try:
        seat.engine.warm.order("drop")
    except (ChildDied, ChildError):
        seat.engine.warm.stop()
