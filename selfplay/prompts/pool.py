"""The prompts of a run: those it began with and those that joined later.

<run>/pool/prompts/000000000.arrow   what the importer wrote, in parts; a name is the number of the first prompt in it
          /facts.arrow               what draws and admissions ask about each of these prompts (parts.FACTS)
          /added/0001.parquet        prompts that joined later, a file each time, of which some become one (added.py)
                                     beside each of these its hash
          /manifest.json             hashes of what the importer wrote (sealing.py)
          /orders/                   the order of an epoch (orders.py)
          /pool.parquet              in runs that began before there were parts: all that the importer wrote
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.prompts import added, parts, rows
from selfplay.prompts.formats import hashes_of, names
from selfplay.prompts.held_out import WORDS, HeldOut, same
from selfplay.prompts.workers import cores
from selfplay.storage import folders, tables
from selfplay.types import Prompt, Split

PROMPTS, FACTS, ADDED, ORDERS, OLD = "prompts", "facts.arrow", "added", "orders", "pool.parquet"
POLICY = "policy"  # in it until it has its number: the initial policy, where one was made of what the user named
CHUNK = 4096  # prompts that are read at a time
READERS = 4  # files that are read at a time, where there are processors for them
assert set(parts.SPLITS) == set(get_args(Split))


@dataclass(frozen=True, slots=True, kw_only=True)
class Added(Prompt):
    """A prompt that joined later, as it is written."""

    same: int | None = None
    """held_out.same of its messages."""


class Pool:
    """The prompts of a run, in the order they came. Of each some 30 bytes are in memory; the rest is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, _files(folder)
        self._ends = np.cumsum([rows.count(file) for file in self._files], dtype=np.int64)
        known = [_imported(folder), *map(_added, added.files(folder / ADDED))]
        self._hashes, self._splits, self._joined = (np.concatenate(columns) for columns in zip(*known, strict=True))
        self._order: NDArray[np.int64] | None = None  # of the hashes, once somebody looks for one
        self._training: tuple[NDArray[np.int64], NDArray[np.int32]] | None = None  # likewise

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, prompt_id: object) -> bool:
        return isinstance(prompt_id, str) and self._places([prompt_id])[0] >= 0

    def __iter__(self) -> Iterator[Prompt]:
        """All prompts, of which a few are in memory at a time."""
        for start in range(0, len(self), CHUNK):
            yield from self._records(np.arange(start, min(start + CHUNK, len(self))))

    def ids(self, split: Split) -> list[str]:
        """prompt_ids of a split."""
        return names(self._hashes[self._splits == parts.SPLITS.index(split)])

    def training(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """(hashes, first rounds) of the prompts to train on, (n,) each; first round 0: it was there from the start."""
        if self._training is None:
            train = self._splits == parts.SPLITS.index("train")
            self._training = self._hashes[train], self._joined[train]
        return self._training

    def read(self, prompt_ids: Sequence[str]) -> list[Prompt]:
        """These prompts, in this order. For a few: all of them are in memory. Raises KeyError."""
        return self._records(self._found(prompt_ids))

    def write(self, prompt_ids: Sequence[str], path: Path) -> None:
        """Write these prompts, in this order, to a file of `Prompt` rows; some thousand are in memory at a time. Raises KeyError."""
        places = self._found(prompt_ids)
        with tables.writing(path, Prompt) as file:
            for start in range(0, len(places), CHUNK):
                file.table(self._table(places[start : start + CHUNK]))

    def join(self, prompts: Iterable[Prompt]) -> int:
        """Let prompts join for good, those that are new; returns how many. Only the runner of the run folder may."""
        new = list({p.prompt_id: p for p in prompts if p.prompt_id not in self}.values())
        if new:
            file = write_added(self._folder, new)
            self._files.append(file)
            self._ends = np.append(self._ends, len(self) + len(new))
            hashes, splits, joined = _added(file)
            self._hashes = np.append(self._hashes, hashes)
            self._splits, self._joined = np.append(self._splits, splits), np.append(self._joined, joined)
            self._order = self._training = None
            if added.merge(self._folder / ADDED, Added):
                self._files = _files(self._folder)
                self._ends = np.cumsum([rows.count(file) for file in self._files], dtype=np.int64)
        return len(new)

    # what an admission asks

    def has_same(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each number whether a prompt of the pool says the same: held_out.same of its messages."""
        ours = np.unique(numbers)
        found = np.zeros(len(ours), bool)
        for there in self._same():
            at = np.minimum(np.searchsorted(ours, there), len(ours) - 1)
            found[at[ours[at] == there]] = True
        return found[np.searchsorted(ours, numbers)]

    def ancestors(self, prompt_ids: Iterable[str]) -> dict[str, str]:
        """The oldest ancestor of each of these prompts that is in the pool."""
        there = [prompt_id for prompt_id in sorted(set(prompt_ids)) if prompt_id in self]
        return {p.prompt_id: p.ancestor for p in self.read(there)}

    def held_out(self) -> HeldOut:
        """What the held-out prompts say. The audit set is among them."""
        ancestors: list[str] = []
        words: list[pa.Array] = [pa.array([], WORDS)]
        for batch in rows.columns(self._facts(), ["ancestor", "words"]):
            there = batch["ancestor"].is_valid()
            ancestors += batch["ancestor"].filter(there).to_pylist()
            words.append(batch["words"].filter(there))
        return HeldOut(ancestors, pa.concat_arrays(words))

    def _same(self) -> Iterator[NDArray[np.int64]]:
        for batch in rows.columns(self._facts(), ["same"]):
            yield batch["same"].to_numpy()
        for file in added.files(self._folder / ADDED):
            yield _added_same(file)

    def _facts(self) -> Path:
        """The file of facts. An old pool has none before the first admission; it takes one reading of the whole pool."""
        path = self._folder / FACTS
        if not path.is_file():
            with rows.writing(path, parts.FACTS) as file:
                for table in tables.each_group(self._folder / OLD, row_type=Prompt):
                    file.write_table(parts.facts_of(tables.records(table, Prompt)))
        return path

    # places in the pool

    def _places(self, prompt_ids: Sequence[str]) -> NDArray[np.int64]:
        """Where each of these prompts is in the pool; −1: it is not."""
        if not len(self) or not prompt_ids:
            return np.full(len(prompt_ids), -1)
        if self._order is None:
            self._order = np.argsort(self._hashes, kind="stable")
        wanted = hashes_of(prompt_ids)
        at = np.searchsorted(self._hashes, wanted, sorter=self._order)
        places = self._order[np.minimum(at, len(self) - 1)]
        return np.where((self._hashes[places] == wanted) & (wanted >= 0), places, -1)

    def _found(self, prompt_ids: Sequence[str]) -> NDArray[np.int64]:
        places = self._places(prompt_ids)
        if len(missing := np.flatnonzero(places < 0)):
            raise KeyError(prompt_ids[int(missing[0])])
        return places

    def _records(self, places: NDArray[np.int64]) -> list[Prompt]:
        return tables.records(self._table(places), Prompt)

    def _table(self, places: NDArray[np.int64]) -> pa.Table:
        """These rows, in this order. They are read in the order of the files, several files at a time."""
        order = np.argsort(places, kind="stable")
        ordered = places[order]
        files = np.searchsorted(self._ends, ordered, side="right")

        def read(file: int) -> pa.Table:
            start = int(self._ends[file - 1]) if file else 0
            return rows.take(self._files[file], ordered[files == file] - start)

        # Most of it is unpacking, for which Arrow needs no lock of Python. More readers than processors wait for each other.
        with ThreadPoolExecutor(min(READERS, cores())) as readers:
            found = [tables.schema(Prompt).empty_table(), *readers.map(read, np.unique(files).tolist())]
        back = np.empty(len(places), np.int64)
        back[order] = np.arange(len(places))
        return pa.concat_tables(found).combine_chunks().take(pa.array(back))


def page(folder: Path, start: int, count: int) -> tuple[list[Prompt], int]:
    """Up to `count` prompts from number `start` on in the order they came, and how many there are; none before the import."""
    try:
        return _page(folder, start, count)
    except FileNotFoundError:  # The run has just made one file of several.
        return _page(folder, start, count)


def _page(folder: Path, start: int, count: int) -> tuple[list[Prompt], int]:
    found: list[Prompt] = []
    total = 0
    for file in _files(folder):
        there = rows.count(file)
        low = max(start - total, 0)
        if low < there and len(found) < count:
            numbers = np.arange(low, min(low + count - len(found), there))
            found += tables.records(rows.take(file, numbers), Prompt)
        total += there
    return found, total


def assemble(folder: Path, made: Sequence[parts.Made]) -> None:
    """Make the folder of a pool from finished parts, which stay where they are as well: as the same files, where that can be."""
    (folder / PROMPTS).mkdir()
    start = 0
    with rows.writing(folder / FACTS, parts.FACTS) as facts:
        for part in made:
            for batch in rows.columns(part.facts, parts.FACTS.names):
                facts.write_batch(batch)
            if count := part.counts.total():
                _link(part.prompts, folder / PROMPTS / f"{start:09d}{rows.ARROW}")
            start += count


def _link(path: Path, new: Path) -> None:
    try:
        os.link(path, new)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, new)


def write_added(folder: Path, prompts: Sequence[Prompt]) -> Path:
    """Let prompts join, whole or not at all; returns their file. Only the runner of the run folder may."""
    with folders.disk_errors(folder / ADDED):
        (folder / ADDED).mkdir(exist_ok=True)
    path = added.next_file(folder / ADDED)
    fields = [field.name for field in dataclasses.fields(Prompt)]
    records = [Added(**{name: getattr(p, name) for name in fields}, same=same(p.messages)) for p in prompts]
    added.write(path, Added, [tables.to_table(records, Added)])
    folders.sync(folder)
    return path


def _files(folder: Path) -> list[Path]:
    """The files of a pool in the order of their prompts."""
    old = [folder / OLD] if (folder / OLD).is_file() else []
    return [*old, *sorted((folder / PROMPTS).glob(f"*{rows.ARROW}")), *added.files(folder / ADDED)]


Known = tuple[NDArray[np.int64], NDArray[np.int8], NDArray[np.int32]]
"""Hashes, numbers of the splits and first rounds (0: from the start) of some prompts."""


def _imported(folder: Path) -> Known:
    if not (folder / FACTS).is_file():
        return _added(folder / OLD)  # which has the same columns
    found = [(np.empty(0, np.int64), np.empty(0, np.int8))]
    for batch in rows.columns(folder / FACTS, ["prompt_id", "split"]):
        found.append((batch["prompt_id"].to_numpy(), batch["split"].to_numpy()))
    hashes, splits = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return hashes, splits, np.zeros(len(hashes), np.int32)


def _added(file: Path) -> Known:
    found = list(tables.read_columns(file, ("prompt_id", "split", "joined")))
    return (
        hashes_of([prompt_id for prompt_id, _, _ in found]),
        np.array([parts.SPLITS.index(split) for _, split, _ in found], np.int8),
        np.array([joined or 0 for _, _, joined in found], np.int32),
    )


def _added_same(file: Path) -> NDArray[np.int64]:
    """Those of a file of prompts that joined; a file that was written before they were kept in it is read whole."""
    kept = [number for (number,) in tables.read_columns(file, ("same",))]
    if None in kept:
        kept = [same(p.messages) for p in tables.each_row(file, Prompt)]
    return np.array(kept, np.int64)
