"""Pairs of earlier rounds that a round trains on again (`train.replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfplay.methods.replay import draw
from selfplay.storage import tables
from selfplay.types import Pair


def write_replayed(path: Path, earlier: Sequence[Path], count: int, seed: int) -> int:
    """Write `count` pairs, drawn from the files of pairs that earlier rounds trained on; returns how many there were.

    They are whole pairs, as on disk, with the log-probabilities of the policies that sampled them. The trainer computes those of
    the present reference itself, as for all pairs. Of files with fewer pairs all are taken.
    """
    names = tables.schema(Pair).names
    with tables.writing(path, Pair) as file:
        for source, rows in zip(earlier, draw([tables.count_rows(p) for p in earlier], count, seed), strict=True):
            with tables.RowReader(source, names, Pair) as pairs:
                for start in range(0, len(rows), tables.GROUP_ROWS):
                    file.table(pairs.take(rows[start : start + tables.GROUP_ROWS]))
        return file.rows
