"""Parquet and Arrow: only the columns that count are read, a few hundred rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from selfplay.errors import InputError
from selfplay.prompts import references
from selfplay.prompts.files import kinds
from selfplay.prompts.formats.reading import NAMED, Reading, Row

BATCH_ROWS = 256
NOT_NAMES = (OSError, ValueError, KeyError, NotImplementedError)  # what pyarrow raises for a file that it cannot read


def groups(path: Path) -> list[int]:
    """The rows of each row group of a Parquet file. Raises InputError."""
    with parquet(path) as file:
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]


def parquet_batches(
    path: Path, reading: Reading, first: int = 0, last: int | None = None, size: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The columns that count of row groups first … last − 1. Raises InputError."""
    with parquet(path) as file:
        layout = file.schema_arrow
        chosen, columns = list(range(file.num_row_groups))[first:last], wanted(layout, reading)
        if not columns:  # Arrow does not say how many rows without a column it has read
            for group in chosen:
                yield _empty(file.metadata.row_group(group).num_rows)
            return
        try:
            yield from file.iter_batches(size, row_groups=chosen, columns=columns, use_threads=False)
        except NOT_NAMES as error:
            raise _unreadable(path, "Parquet", error) from None


def arrow_batches(path: Path, reading: Reading) -> Iterator[pa.RecordBatch]:
    """The columns that count of an Arrow file, or of an Arrow stream, as `datasets` keeps it. Raises InputError."""
    try:
        with pa.OSFile(str(path)) as source:
            if _is_stream(source):
                with ipc.open_stream(source) as stream:
                    found = wanted(stream.schema, reading)
                    for batch in stream:
                        yield batch.select(found) if found else _empty(batch.num_rows)
                return
            found = wanted(ipc.open_file(source).schema, reading)
            fields = [ipc.open_file(source).schema.get_field_index(name) for name in found]
            options = ipc.IpcReadOptions(included_fields=fields or None, use_threads=False)
            with ipc.open_file(source, options=options) as file:
                for i in range(file.num_record_batches):
                    batch = file.get_batch(i)
                    yield batch.select(found) if found else _empty(batch.num_rows)
    except NOT_NAMES as error:
        raise _unreadable(path, "Arrow", error) from None


def columns(path: Path, kind: str, reading: Reading) -> list[str]:
    """The columns that count of a Parquet (`kind`) or Arrow file. Raises InputError."""
    if kind == kinds.PARQUET:
        with parquet(path) as file:
            return wanted(file.schema_arrow, reading)
    try:
        with pa.OSFile(str(path)) as source:
            opener = ipc.open_stream if _is_stream(source) else ipc.open_file
            return wanted(opener(source).schema, reading)
    except NOT_NAMES as error:
        raise _unreadable(path, "Arrow", error) from None


def _is_stream(source: pa.OSFile) -> bool:
    magic = source.read(6)
    source.seek(0)
    return bool(magic != b"ARROW1")


def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[Row]:
    """The rows of batches. A value that Python cannot hold is null in `meta`, and elsewhere sets its row aside."""
    for batch in batches:
        if not batch.num_columns:
            yield from ({} for _ in range(batch.num_rows))
            continue
        for start in range(0, batch.num_rows, BATCH_ROWS):
            some = batch.slice(start, BATCH_ROWS)
            try:
                yield from some.to_pylist()
            except (ValueError, OverflowError, ArithmeticError):
                yield from _one_by_one(some)


def wanted(layout: pa.Schema, reading: Reading) -> list[str]:
    """The columns that count. What holds numbers is no prompt, whatever it is called; with a filter all are read."""
    found = reading.columns(layout.names)
    if reading.filter is not None:
        return found
    prompts = [name for name in reading.prompts(layout.names) if not _numbers(layout.field(name).type)]
    if not prompts:
        found = layout.names[:NAMED]  # as for a file that has none: a message names them
    unused = {name for name in found if name not in prompts and _numbers(layout.field(name).type)}
    return [name for name in found if name not in unused - set(KEPT) - {reading.reference, *reading.meta}]


KEPT = ("meta", *references.COLUMNS)
"""Columns beside a prompt that may hold numbers."""


@contextlib.contextmanager
def parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path)
    except NOT_NAMES as error:
        raise _unreadable(path, "Parquet", error) from None
    with file:
        yield file


def _numbers(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if lists else kind
    return bool(pa.types.is_primitive(inner) and not pa.types.is_boolean(inner))


def _one_by_one(batch: pa.RecordBatch) -> Iterator[Row]:
    for i in range(batch.num_rows):
        row: Row = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                value = column[i].as_py()
            except UnicodeDecodeError:
                value, row = None, "invalid UTF-8"
            except (ValueError, OverflowError, ArithmeticError) as error:
                value = _as_text(column[i])
                if value is None and name.lower() != "meta":
                    row = f"a value that cannot be read ({type(error).__name__})"
            if isinstance(row, dict):
                row[name] = value
        yield row


def _as_text(scalar: Any) -> str | None:
    """A time that Python's calendar does not have, as Arrow writes it."""
    try:
        return str(scalar.cast(pa.string()).as_py())
    except (ValueError, NotImplementedError):
        return None


def _empty(count: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.array([{}] * count, pa.struct([])))


def _unreadable(path: Path, kind: str, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as {kind}: {error}", "it may be cut off: fetch it again")
