"""The files of the prompts that joined a pool: few, however often prompts join.

Each join writes a file, `0001.parquet`. As soon as there are FILES of a size, they become one: `0001-0032.parquet`, and
later `0001-1024.parquet`. So each prompt is written anew once or twice in ten thousand joins, and a pool that is opened
reads some dozen files. A merge that was killed leaves files whose prompts are in a longer one too; these do not count.

Each file has its hash beside it (`storage/seals.py`). Only files that are what their hashes say become one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa

from selfplay.errors import DamagedError
from selfplay.storage import folders, seals, tables

FILES = 32  # of one size; one more size for each power of it

Span = tuple[int, int]  # the first and the last join whose prompts a file has


def files(folder: Path) -> list[Path]:
    """The files that count, in the order of their prompts."""
    found: list[Path] = []
    end = 0
    for (first, last), path in sorted(_spans(folder), key=lambda one: (one[0][0], -one[0][1])):
        if first > end:
            found.append(path)
            end = last
    return found


def next_file(folder: Path) -> Path:
    """The name of the file of the next join."""
    return folder / f"{1 + max((last for (_, last), _ in _spans(folder)), default=0):04d}.parquet"


def merge(folder: Path, row_type: type[Any]) -> bool:
    """Make one file of the newest, where there are enough of one size; returns whether something changed.

    Only the runner of the run folder may. Whoever reads the folder meanwhile may find a file gone, and lists them anew.
    Raises DamagedError.
    """
    changed = False
    while len(same := _newest_of_one_size(there := files(folder))) >= FILES:
        for path in same:
            if seals.beside(path).is_file() and not seals.is_sealed(path):  # an earlier version kept no hashes
                raise DamagedError(path, "its SHA-256 differs from the one beside it")
        write(folder / f"{_span(same[0])[0]:04d}-{_span(same[-1])[1]:04d}.parquet", row_type, _tables(same, row_type))
        changed = True
    if changed:
        there = files(folder)
        for _, path in _spans(folder):
            if path not in there:
                seals.beside(path).unlink(missing_ok=True)  # before the file, which would be missed by its hash
                path.unlink()
        folders.sync(folder)
    return changed


def write(path: Path, row_type: type[Any], content: Iterable[pa.Table]) -> None:
    """Write a file with its hash, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with folders.disk_errors(path), tables.writing_to(partial, row_type) as file:
        for table in content:
            file.table(table)
    seals.finish(partial, path)


def _tables(paths: Sequence[Path], row_type: type[Any]) -> Iterator[pa.Table]:
    for path in paths:
        yield from tables.each_group(path, row_type=row_type)


def _newest_of_one_size(there: list[Path]) -> list[Path]:
    """The files at the end of a list that have the prompts of as many joins as the last one."""
    if not there:
        return []
    size = _size(there[-1])
    return list(takewhile(lambda path: _size(path) == size, reversed(there)))[::-1]


def _size(path: Path) -> int:
    first, last = _span(path)
    return last - first


def _span(path: Path) -> Span:
    first, _, last = path.stem.partition("-")
    return int(first), int(last or first)


def _spans(folder: Path) -> list[tuple[Span, Path]]:
    return [(_span(path), path) for path in folder.glob("[0-9]*.parquet")]
