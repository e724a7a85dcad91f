"""Copies that the import makes of what cannot be read in parts: compressed files, large arrays and tables, the Hub's data sets.

Each has its hash beside it. One that a killed import left, and that is damaged or has no hash, is made again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reward import hub
from selfplay.errors import InputError
from selfplay.prompts.files import columnar, kinds, part, streams
from selfplay.prompts.files.part import COPIED, Part, parts, ranges
from selfplay.prompts.files.sources import files_of
from selfplay.prompts.formats import Reading
from selfplay.prompts.workers import each
from selfplay.storage import folders, seals


def in_parts(source: str, reading: Reading, split: str, config: str | None, copies: Path, workers: int) -> list[Part]:
    """All rows of a source in parts that are small. Copies are written to files whose names begin as `copies`; finished
    ones are used again. Raises InputError."""
    found = files_of(source, split, config)
    if found is None:
        copy = copies.with_name(f"{copies.name}.parquet")
        if not seals.is_whole(copy, earlier=False):
            for made in copy.parent.glob("[0-9]*.arrow"):
                folders.delete(made)  # of a copy that is gone: the dataset may be another by now
            from_hub(source, config, split, reading, copy)
        return parts(copy, reading, split)
    work = partial(_file_in_parts, reading=reading, split=split, copies=copies)
    return [one for some in each(work, list(enumerate(found.paths)), workers) for one in some]


def _file_in_parts(item: tuple[int, Path], *, reading: Reading, split: str, copies: Path) -> list[Part]:
    number, path = item
    kind, packed = kinds.kind_of(path), kinds.is_packed(streams.head(path))
    copy = copies.with_name(f"{copies.name}-{number:05d}")
    if kind == kinds.PARQUET:
        rows = columnar.groups(path)
        if max(rows, default=0) <= 2 * part.PART_ROWS:
            return parts(path, reading, split)
        return _in_small_groups(path, kind, reading, copy.with_suffix(".parquet"))
    if kind == kinds.ARROW:
        return _in_small_groups(path, kind, reading, copy.with_suffix(".parquet"))
    if kind in (kinds.LINES, kinds.TEXT) and packed:
        copy = copy.with_suffix(".lines")
        if not seals.is_whole(copy, earlier=False):
            with seals.whole(copy) as unfinished, unfinished.open("wb") as out, streams.opened(path) as stream:
                shutil.copyfileobj(stream, out, streams.BLOCK)
        return ranges(copy, kind, reading)
    if kind in (kinds.LINES, kinds.TEXT) or (not packed and path.stat().st_size <= part.PART_BYTES):
        return parts(path, reading, split)
    copy = copy.with_suffix(".copied")
    if not seals.is_whole(copy, earlier=False):
        _copy_rows(Part(path=path, kind=kind, reading=reading, split=split), copy)
    return ranges(copy, COPIED, reading)


def _copy_rows(source: Part, copy: Path) -> None:
    """The columns that count of each row, a line a row."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    with seals.whole(copy) as unfinished, unfinished.open("w", encoding="ascii") as out:
        for row in source.rows():
            if isinstance(row, str):
                out.write(json.dumps({"why": row}) + "\n")
                continue
            keys = tuple(row)
            if keys not in wanted:
                if len(wanted) >= 1024:
                    wanted.clear()
                wanted[keys] = source.reading.columns(keys)
            out.write(json.dumps({"row": {name: row[name] for name in wanted[keys]}}) + "\n")


def _in_small_groups(path: Path, kind: str, reading: Reading, copy: Path) -> list[Part]:
    if not columnar.columns(path, kind, reading):  # a copy without columns would have no rows
        return parts(path, reading)
    if not seals.is_whole(copy, earlier=False):
        if kind == kinds.PARQUET:
            batches = columnar.parquet_batches(path, reading, size=part.PART_ROWS)
        else:
            batches = columnar.arrow_batches(path, reading)
        _copy((pa.Table.from_batches([batch]) for batch in batches), copy, path)
    return parts(copy, reading)


def from_hub(name: str, config: str | None, split: str, reading: Reading, copy: Path, first: int | None = None) -> None:
    """Load a Hub dataset and copy the columns that count to a Parquet file, a batch at a time. Raises InputError.

    first: of how many rows, which are streamed; None: of all, which are downloaded. Without a network both are those of a copy in
    the cache. A slice of a split cannot be streamed: its rows come from the beginning of the split.
    """
    hub.bounded()
    import datasets

    try:
        if first is None or datasets.config.HF_HUB_OFFLINE:
            rows = datasets.load_dataset(name, config, split=split)
        else:
            rows = datasets.load_dataset(name, config, split=re.sub(r"\[.*?]", "", split), streaming=True)
        if first is not None:
            rows = rows.take(first)
        there = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # the library raises a dozen unrelated types
        several = "onfig name is missing" in str(error) or "BuilderConfig" in str(error)
        raise InputError(
            f"prompts.source {name!r} is no file here, and loading it from the Hub failed: {error}",
            "name one of its configurations in prompts.config" if several
            else "give files of prompts, or a dataset id and a split that exist",
        ) from None  # fmt: skip
    wanted = reading.columns(there)
    if reading.prompt is not None and not {reading.prompt, reading.prompt.partition(".")[0]} & set(there):
        raise InputError(f"{name} has no column {reading.prompt!r}; it has {', '.join(there)}", "mend prompts.columns")
    if not reading.prompts(there):
        raise InputError(
            f"no known format of prompts is in {name}; it has the columns {', '.join(there)}",
            f"name the column with the prompt in prompts.columns, such as {{prompt: {there[0]}}}",
        )
    _copy(rows.select_columns(wanted).with_format("arrow").iter(part.PART_ROWS), copy, Path(name))


def _copy(tables: Iterable[pa.Table], path: Path, source: Path) -> None:
    with seals.whole(path) as unfinished:
        writer = None
        for table in tables:
            writer = writer or pq.ParquetWriter(unfinished, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=part.PART_ROWS)
        if writer is None:
            raise InputError(f"{source} has no rows")
        writer.close()
