"""Records on disk: Parquet files whose columns are the fields of a record type of `selfplay.types`.

Files are written and read row group by row group. What needs whole columns (rewards, margins, keys) reads just these;
token ids and texts stay in Arrow and never become Python objects, except for the few rows that somebody looks at.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selfplay.errors import DamagedError
from selfplay.storage import seals
from selfplay.storage.folders import disk_errors, whole

Row = TypeVar("Row")
GROUP_ROWS = 256  # rows that a reader of one row has to decode


def leave_pandas_out() -> None:
    """Keep pyarrow from importing pandas at its first conversion: 55 MB and half a second that nothing here has a use for.

    For processes without pandas of their own: what pyarrow does with a Series afterwards is not what it did before.
    """
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, _NoPandas)
        try:
            pa.array([""])  # it looks once
        finally:
            sys.meta_path.remove(_NoPandas)


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ImportError(name)


_ARROW = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    list[int]: pa.list_(pa.int32()),  # token ids
    list[str]: pa.list_(pa.string()),
    list[dict[str, str]]: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}


_schemas: dict[type[Any], pa.Schema] = {}


def schema(row_type: type[Any]) -> pa.Schema:
    """Arrow schema of a record type: one column a field, in order. A dict is stored as JSON text."""
    if row_type not in _schemas:
        hints = typing.get_type_hints(row_type)
        _schemas[row_type] = pa.schema(
            [(f.name, _ARROW.get(_bare(hints[f.name]), pa.string())) for f in dataclasses.fields(row_type)]
        )
    return _schemas[row_type]


def _json_fields(row_type: type[Any]) -> frozenset[str]:
    hints = typing.get_type_hints(row_type)
    return frozenset(name for name, hint in hints.items() if typing.get_origin(_bare(hint)) is dict)


def _bare(hint: Any) -> Any:
    """The type behind `X | None`, and `str` behind a Literal of strings."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return str if typing.get_origin(hint) is typing.Literal else hint


# writing


@contextlib.contextmanager
def writing(path: Path, row_type: type[Any]) -> Iterator[Writer]:
    """Yield a writer of one file of records. The file appears whole or not at all (temporary name, fsync, rename)."""
    with whole(path) as partial, writing_to(partial, row_type) as file:
        yield file


@contextlib.contextmanager
def writing_to(path: Path, row_type: type[Any]) -> Iterator[Writer]:
    """Yield a writer of one file of records, under this very name: for a file that somebody else makes durable."""
    layout = schema(row_type)
    texts = [f.name for f in layout if f.type == pa.string()]
    numbers = [f.name for f in layout if f.type == pa.float64()]
    numbers += [f"{f.name}.list.element" for f in layout if f.type == pa.list_(pa.int32())]
    # Split by bytes, token ids take half the space, and writing and reading them takes half the time. Statistics would put
    # whole texts into the footer, which every reader decodes; nothing asks for them.
    with pq.ParquetWriter(
        path,
        layout,
        compression="zstd",
        use_dictionary=texts,
        use_byte_stream_split=numbers,
        write_statistics=False,
        write_page_checksum=True,
    ) as file:
        yield Writer(file, row_type)


class Writer:
    """Adds rows to a file of records; each call ends a row group."""

    def __init__(self, file: pq.ParquetWriter, row_type: type[Any]) -> None:
        self._file, self._row_type = file, row_type
        self.rows = 0  # written so far

    def table(self, table: pa.Table) -> None:
        """Add the rows of a table. It must have the record's columns, in any order."""
        layout = schema(self._row_type)
        table = table.select(layout.names).cast(layout)
        if table.num_rows:
            self._file.write_table(table, row_group_size=GROUP_ROWS)
        self.rows += table.num_rows

    def records(self, rows: Sequence[Any]) -> None:
        """Add records."""
        self.table(to_table(rows, self._row_type))


def to_table(rows: Sequence[Any], row_type: type[Any]) -> pa.Table:
    """The records as an Arrow table."""
    json_fields, layout = _json_fields(row_type), schema(row_type)
    columns = {
        name: [
            json.dumps(v, sort_keys=True) if name in json_fields else v for v in (getattr(row, name) for row in rows)
        ]
        for name in layout.names
    }
    return pa.table(columns, schema=layout)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as it is, whole or not at all, with its hash beside it (`storage/seals.py`)."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)
    seals.finish(partial, path)


def write_rows(path: Path, rows: Sequence[Any], row_type: type[Any]) -> None:
    """Write records, whole or not at all. For files that are small, since all records are in memory."""
    with writing(path, row_type) as file:
        file.records(rows)


# reading records


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """All records of a file. For files that are small, since all records are in memory."""
    return list(each_row(path, row_type))


def each_row(path: Path, row_type: type[Row]) -> Iterator[Row]:
    """All records in order, of which no more than a row group is in memory at a time."""
    for table in each_group(path, row_type=row_type):
        yield from records(table, row_type)


def read_row(path: Path, row_type: type[Row], index: int) -> Row:
    """One record, of which no more is decoded than its row group. Raises IndexError."""
    found = read_slice(path, row_type, index, 1) if index >= 0 else []
    if not found:
        raise IndexError(f"{path} has {count_rows(path)} rows, none is number {index}")
    return found[0]


def read_slice(path: Path, row_type: type[Row], start: int, count: int) -> list[Row]:
    """Up to `count` records from number `start` on, of which no more is decoded than their row groups."""
    found: list[Row] = []
    for table in each_group(path, row_type=row_type, start=start, count=count):
        found += records(table, row_type)
    return found


def rows_with(path: Path, row_type: type[Row], column: str, values: Container[str]) -> Iterator[Row]:
    """The records whose `column` is one of `values`, in order; of row groups without any, only that column is decoded."""
    with _opened(path) as file:
        keys, groups = _Groups(path, file, [column], row_type), _Groups(path, file, schema(row_type).names, row_type)
        for group in range(file.num_row_groups):
            # Compared in Python: Arrow's own way to a mask imports pandas, which is 40 MB.
            cells = keys.read(group)[column].to_pylist()
            if found := [i for i, cell in enumerate(cells) if cell in values]:
                table = groups.read(group)
                for i in found:
                    yield from records(table.slice(i, 1), row_type)
    release_unused()


def records(table: pa.Table, row_type: type[Row]) -> list[Row]:
    """The rows of a table as records."""
    json_fields = _json_fields(row_type)
    return [
        row_type(**{k: json.loads(v) if k in json_fields else v for k, v in row.items()}) for row in table.to_pylist()
    ]


# reading columns


def each_group(
    path: Path,
    names: Sequence[str] | None = None,
    *,
    row_type: type[Any] | None = None,
    start: int = 0,
    count: int | None = None,
) -> Iterator[pa.Table]:
    """Tables of the rows start … start + count − 1, one for each row group that has some of them.

    `names`: the columns to decode, by default all. `row_type`: the record type whose columns are wanted; a file that was
    written before a column was there, or with other integer widths, is read as if it were written today.
    """
    assert names is not None or row_type is not None, "say which columns are wanted"
    wanted = list(names if names is not None else schema(row_type).names)  # type: ignore[arg-type]
    before = 0
    with _opened(path) as file:
        groups = _Groups(path, file, wanted, row_type)
        for group, rows in enumerate(groups.rows):
            low = max(start - before, 0)
            high = rows if count is None else min(start + count - before, rows)
            if low < high:
                yield groups.read(group).slice(low, high - low)
            before += rows
            if count is not None and before >= start + count:
                break
    release_unused()


def read_table(path: Path, names: Sequence[str], row_type: type[Any] | None = None) -> pa.Table:
    """Some whole columns of a file. Not for token ids or texts of a whole round."""
    with _opened(path) as file:
        return _Groups(path, file, names, row_type).whole()


def read_array(path: Path, name: str) -> NDArray[Any]:
    """One numeric column (N,) of a file; NaN stands for a missing number."""
    return to_array(read_table(path, [name])[name])


def to_array(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """A numeric column as NumPy; NaN stands for a missing number."""
    return np.asarray(
        column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    )


def read_column(path: Path, name: str) -> list[Any]:
    """One column of a file of records."""
    return read_table(path, [name])[name].to_pylist()  # type: ignore[no-any-return]


def read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a file of records, row by row; None where the file was written before a column was there."""
    for table in each_group(path, names):
        there = table.column_names
        absent = [None] * table.num_rows
        yield from zip(*(table[n].to_pylist() if n in there else absent for n in names), strict=True)


class RowReader:
    """Rows of a file by their numbers. Rows that are asked for in ascending order cost one pass over their row groups."""

    def __init__(self, path: Path, names: Sequence[str], row_type: type[Any]) -> None:
        self._empty = schema(row_type).empty_table().select(list(names))
        self._file = _opened(path)
        self._groups = _Groups(path, self._file, names, row_type)
        self._starts = np.concatenate([[0], np.cumsum(self._groups.rows, dtype=np.int64)])
        self._last: tuple[int, pa.Table] | None = None  # the group that the next call probably needs again

    def __enter__(self) -> RowReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._last = None
        release_unused()

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> pa.Table:
        """The rows with these numbers, in this order."""
        wanted = np.asarray(rows, np.int64)
        assert wanted.size == 0 or (wanted.min() >= 0 and wanted.max() < self._starts[-1]), "rows that are not there"
        order = np.argsort(wanted, kind="stable")
        groups = np.searchsorted(self._starts, wanted[order], side="right") - 1
        found = []
        for group in np.unique(groups):
            local = wanted[order][groups == group] - self._starts[group]
            found.append(self._decoded(int(group)).take(pa.array(local)))
        if not found:
            return self._empty
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_tables(found).take(pa.array(back))

    def _decoded(self, group: int) -> pa.Table:
        if self._last is None or self._last[0] != group:
            self._last = group, self._groups.read(group)
        return self._last[1]


def count_rows(path: Path) -> int:
    """Records of a file, from its footer alone."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read_whole(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """A file as it is, all of it in memory, for a process that trains on it."""
    with _damage(path):
        return pq.read_table(path, columns=None if names is None else list(names), page_checksum_verification=True)


def _opened(path: Path) -> pq.ParquetFile:
    """An open file, each page of which is checked against its checksum when it is read. Raises DamagedError."""
    with _damage(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _ = file.schema_arrow  # it is decoded here, where damage is told
        return file


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what Arrow says of bytes that it cannot read into a DamagedError with the file's name."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DamagedError(path, str(error)) from error
    except OSError as error:
        if error.errno is None and path.is_file():  # Arrow's own word for a page that is not what its checksum says
            raise DamagedError(path, str(error)) from error
        raise


class _Groups:
    """The row groups of an open file: some columns of each, with the types that the record type has today."""

    def __init__(self, path: Path, file: pq.ParquetFile, names: Sequence[str], row_type: type[Any] | None) -> None:
        self._path, self._file, self._names, self._row_type = path, file, list(names), row_type
        self._written = file.schema_arrow.empty_table()
        self._there = [name for name in self._names if name in self._written.column_names]
        self.rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

    def read(self, group: int) -> pa.Table:
        with _damage(self._path):
            return self._complete(self._file.read_row_group(group, columns=self._there, use_threads=False))

    def whole(self) -> pa.Table:
        """All groups."""
        groups = [self.read(group) for group in range(len(self.rows))]
        return pa.concat_tables(groups) if groups else self._complete(self._written.select(self._there))

    def _complete(self, table: pa.Table) -> pa.Table:
        return table if self._row_type is None else completed(table, self._names, self._row_type)


def completed(table: pa.Table, names: Sequence[str], row_type: type[Any]) -> pa.Table:
    """The columns `names` of a table as the record type has them today; one that is not there is null."""
    layout, there = schema(row_type), table.column_names
    for name in names:
        field = layout.field(name)
        if name not in there:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        elif table.schema.field(name).type != field.type:
            table = table.set_column(table.column_names.index(name), field, table[name].cast(field.type))
    return table.select(list(names))


def release_unused() -> None:
    """Have Arrow return the memory that it holds for later."""
    pa.default_memory_pool().release_unused()


def give_back_memory() -> None:
    """Return what was freed to the system: allocators keep it for the next peak, which comes a little higher each time."""
    release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
