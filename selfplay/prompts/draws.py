"""What was drawn of a pool, as the ledger keeps it, and what comes next.

Every prompt has a level: how often it was drawn, counted on from the epoch in which it joined. The next draw takes the
prompts of the lowest level first, each level in a seeded order of its own. A prompt that joins later takes a random place
in the order of the epoch that runs, and waits for the next epoch where that place is among those drawn already: new
prompts are as frequent in the next draws as in the pool.

The ledger has the levels after each round that drew. Along the order of the epoch they are nearly all ones and then
nearly all zeros, so packed they take some hundred bytes, and a run of any length is opened by reading one row.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from selfplay.errors import DamagedError, InputError
from selfplay.prompts.formats import hashes_of, names
from selfplay.prompts.orders import Orders
from selfplay.storage import tables

Cursor = tuple[int, int]
"""epoch: the lowest level of the pool; offset: prompts above it."""
DRAWN = ("drawn.parquet", "prompts.parquet")
"""Files of the stage `prompts`; the first that is there has all that was drawn, whether it was passed over then or not."""


class Ledger(Protocol):
    """What is asked of the ledger (`storage.ledger.Store`)."""

    def record_draw(self, index: int, epoch: int, size: int, levels: bytes) -> None:
        """Keep the levels after a round; what was kept of it before is replaced."""

    def draw_before(self, index: int) -> dict[str, Any] | None:
        """(round, epoch, size, levels) of the last round before that one which has them."""

    def round(self, index: int) -> dict[str, Any]:
        """A round, with its `cursor`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """How often the training prompts were drawn that a round may draw, in the order that they came."""

    hashes: NDArray[np.int64]
    """(n,) which prompts they are."""
    level: NDArray[np.int32]
    """(n,)"""
    drawn: NDArray[np.bool_]
    """(n,) whether a prompt was ever drawn."""

    def cursor(self) -> Cursor:
        """Where the pool stands."""
        epoch = int(self.level.min()) if len(self.level) else 0
        return epoch, int((self.level > epoch).sum())

    def next(self, orders: Orders, count: int, at_end: str) -> NDArray[np.int64]:
        """Indices (at most count,) of the prompts that are drawn next, in their order.

        They are fewer where the pool, or with `at_end` «stop» what was never drawn of it, is smaller. Raises InputError
        when all prompts were drawn and `at_end` is «stop».
        """
        left = ~self.drawn if at_end == "stop" else np.ones(len(self.level), bool)
        if not left.any():
            raise InputError("every prompt was drawn once", "add prompts, or set prompts.at_end to reshuffle")
        found = [np.empty(0, np.int64)]
        for level in np.unique(self.level[left]).tolist():
            if (more := count - sum(map(len, found))) <= 0:
                break
            order = orders.order(level, self.hashes)
            found.append(order[(self.level[order] == level) & left[order]][:more])
        return np.concatenate(found)

    def after(self, times: NDArray[np.int32]) -> Levels:
        """The levels once each prompt was drawn so many more times (n,)."""
        return replace(self, level=self.level + times, drawn=self.drawn | (times > 0))

    def joined_by(
        self, hashes: NDArray[np.int64], first: NDArray[np.int32], cursors: dict[int, Cursor], orders: Orders
    ) -> Levels:
        """The levels with all those of `hashes` (m,) that are not among them yet, which stand behind them.

        first: (m,) first round that may draw each, in ascending order; cursors: where the pool stood when it opened.
        """
        known = len(self.level)
        level = np.zeros(len(hashes), np.int32)
        level[:known] = self.level
        for index in np.unique(first[known:]).tolist():
            if not index:
                continue  # they were there from the start
            epoch, offset = cursors[index]
            before, end = (int(np.searchsorted(first, index, side)) for side in ("left", "right"))
            start = max(before, known)
            place = orders.places(epoch, hashes)[start:end]
            # Is its place in this epoch's order among those that were drawn already? Then it waits for the next epoch.
            passed = [p * before < offset * 2**63 for p in place.tolist()]
            level[start:end] = epoch + np.array(passed, np.int32)
        return Levels(hashes=hashes, level=level, drawn=np.append(self.drawn, np.zeros(len(hashes) - known, bool)))


NOBODY = Levels(hashes=np.empty(0, np.int64), level=np.empty(0, np.int32), drawn=np.empty(0, bool))


class Pool(Protocol):
    """What is asked of the pool (`prompts.pool.Pool`)."""

    def training(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...


class Draws:
    """The draws of a run. It reads the pool and the ledger anew at each question, so others may add to them in between."""

    def __init__(self, pool: Pool, ledger: Ledger, rounds: Path, orders: Orders) -> None:
        """`rounds`: the folder of the rounds, from which draws are read that the ledger does not have yet."""
        self._pool, self._ledger, self._rounds, self.orders = pool, ledger, rounds, orders
        self._last: tuple[dict[str, Any], Levels] | None = None  # a row of the ledger, and what it says
        self._in_order: NDArray[np.int32] | None = None  # first rounds of the pool that were looked at

    def cursor(self, index: int) -> Cursor:
        """Where the pool stands when a round opens. Prompts that join in that round are not counted yet."""
        return self._after(index - 1).cursor()

    def levels(self, index: int) -> Levels:
        """The levels of what a round may draw, before it draws. The round is open: its cursor is in the ledger."""
        return self._joined(self._after(index - 1), index)

    def levels_ahead(self, index: int) -> Levels:
        """`levels` of the round that opens next, as long as no other prompts join."""
        before = self._after(index - 1)
        return self._joined(before, index, {index: before.cursor()})

    def record(self, index: int) -> None:
        """Keep in the ledger what a round has drawn, from the folder of its stage. Done twice, it is done once."""
        levels = self.levels(index)
        self._keep(index, levels.after(_times(levels, self._rounds, [index])))

    def _after(self, index: int) -> Levels:
        """The levels after a round. What the ledger does not have yet is read from the folders of the rounds, and kept.

        These are the rounds of a run that began before the ledger had draws, and a round whose runner was killed between
        the end of the stage and its record.
        """
        row = self._ledger.draw_before(index + 1)
        known, levels = (row["round"], self._unpacked(row)) if row is not None else (0, NOBODY)
        levels = self._joined(levels, index)
        missing = [i for i in range(known + 1, index + 1) if _drawn_file(self._rounds, i) is not None]
        if missing:
            levels = levels.after(_times(levels, self._rounds, missing))
            self._keep(index, levels)
        return levels

    def _joined(self, levels: Levels, index: int, known: Mapping[int, Cursor] = MappingProxyType({})) -> Levels:
        """The levels with the prompts that joined up to a round. `known`: cursors that the ledger does not have."""
        hashes, first = self._pool.training()
        if first is not self._in_order:  # the pool has others once prompts have joined
            assert (np.diff(first) >= 0).all(), "prompts that join later stand behind the others"
            self._in_order = first
        there = int(np.searchsorted(first, index, "right"))
        if there == len(levels.level):  # as in nearly every round
            return levels
        new = np.unique(first[len(levels.level) : there]).tolist()
        cursors = {
            i: (int(cursor[0]), int(cursor[1]))
            for i in new
            if i
            for cursor in [known[i] if i in known else self._ledger.round(i)["cursor"]]
        }
        return levels.joined_by(hashes[:there], first[:there], cursors, self.orders)

    def _keep(self, index: int, levels: Levels) -> None:
        epoch, _ = levels.cursor()
        above = levels.level - epoch
        assert not len(above) or above.max() < 128, "levels lie close together"
        order = self.orders.order(epoch, levels.hashes)
        packed = (above.astype(np.uint8) << 1 | levels.drawn)[order]
        kept = zlib.compress(packed.tobytes(), 1)
        self._ledger.record_draw(index, epoch, len(packed), kept)
        self._last = {"round": index, "epoch": epoch, "size": len(packed), "levels": kept}, levels

    def _unpacked(self, row: dict[str, Any]) -> Levels:
        last = self._last
        if last is None or last[0] != row:
            last = self._last = row, self._unpack(row)
        return last[1]

    def _unpack(self, row: dict[str, Any]) -> Levels:
        hashes = self._pool.training()[0][: row["size"]]
        if len(hashes) != row["size"]:  # no prompt ever leaves a pool
            raise InputError(
                f"the ledger knows {row['size']} prompts to train on, and the pool has {len(hashes)} of them",
                "put the folder pool of the run back from a copy",
            )
        values = np.empty(len(hashes), np.uint8)
        values[self.orders.order(row["epoch"], hashes)] = np.frombuffer(zlib.decompress(row["levels"]), np.uint8)
        return Levels(
            hashes=hashes, level=row["epoch"] + (values >> 1).astype(np.int32), drawn=(values & 1).astype(bool)
        )


def _drawn_file(rounds: Path, index: int) -> Path | None:
    folder = rounds / f"{index:04d}" / "prompts"
    return next((folder / name for name in DRAWN if (folder / name).is_file()), None)


def _times(levels: Levels, rounds: Path, indices: Sequence[int]) -> NDArray[np.int32]:
    """How often each prompt was drawn in some rounds, by the folders of their stage."""
    times = np.zeros(len(levels.level), np.int32)
    order = np.argsort(levels.hashes)
    for index in indices:
        path = _drawn_file(rounds, index)
        if path is None:
            raise DamagedError(rounds / f"{index:04d}" / "prompts", "what the round has drawn is gone")
        drawn = hashes_of(tables.read_column(path, "prompt_id"))
        found = order[np.minimum(np.searchsorted(levels.hashes, drawn, sorter=order), len(order) - 1)]
        if not (levels.hashes[found] == drawn).all():
            raise DamagedError(path, "it has prompts that are not in the pool", "put it, or the pool, back from a copy")
        times[found] += 1  # no round draws a prompt twice
    return times


def ids(levels: Levels, indices: NDArray[np.int64] | Sequence[int]) -> list[str]:
    """prompt_ids of some of the prompts."""
    return names(levels.hashes[np.asarray(indices, np.int64)])
