"""Durable files: typed rows as Parquet, and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import types
import typing
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from selfplay.errors import DiskError, SelfplayError

Row = TypeVar("Row")
MANIFEST = "manifest.json"
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
    list[int]: pa.list_(pa.int64()),
    list[str]: pa.list_(pa.string()),
    list[dict[str, str]]: pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
}


def schema(row_type: type[Any]) -> pa.Schema:
    """Arrow schema of a record: one column a field, in order; dicts are stored as JSON text."""
    hints = typing.get_type_hints(row_type)
    return pa.schema([(f.name, _ARROW.get(_bare(hints[f.name]), pa.string())) for f in dataclasses.fields(row_type)])


def _json_fields(row_type: type[Any]) -> frozenset[str]:
    hints = typing.get_type_hints(row_type)
    return frozenset(name for name, hint in hints.items() if typing.get_origin(_bare(hint)) is dict)


def _bare(hint: Any) -> Any:
    """The type behind `X | None`, and `str` behind a Literal of strings."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    return str if typing.get_origin(hint) is typing.Literal else hint


def write_rows(path: Path, rows: Sequence[Any], row_type: type[Any]) -> None:
    """Write records as Parquet, whole or not at all (temporary file, fsync, rename)."""
    json_fields, names = _json_fields(row_type), [f.name for f in dataclasses.fields(row_type)]
    columns = {
        name: [
            json.dumps(v, sort_keys=True) if name in json_fields else v for v in (getattr(row, name) for row in rows)
        ]
        for name in names
    }
    table = pa.table(columns, schema=schema(row_type))
    with whole(path) as partial:
        pq.write_table(table, partial, row_group_size=GROUP_ROWS)


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    return _records(pq.read_table(path, schema=schema(row_type)), row_type)


def each_row(path: Path, row_type: type[Row]) -> Iterator[Row]:
    """All records in order, of which no more than a row group is in memory at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from _records(_group(file, group, row_type), row_type)
    pa.default_memory_pool().release_unused()


def read_columns(path: Path, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Some columns of a file of records, row by row; None where the file was written before a column was there."""
    with pq.ParquetFile(path) as file:
        there = [name for name in names if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=there, use_threads=False)
            absent = [None] * table.num_rows
            yield from zip(*(table[n].to_pylist() if n in there else absent for n in names), strict=True)


def read_row(path: Path, row_type: type[Row], index: int) -> Row:
    """One record, of which no more is decoded than its row group. Raises IndexError."""
    with pq.ParquetFile(path) as file:
        before = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before <= index < before + rows:
                return _records(_group(file, group, row_type).slice(index - before, 1), row_type)[0]
            before += rows
    raise IndexError(f"{path} has {before} rows, none is number {index}")


def read_slice(path: Path, row_type: type[Row], start: int, count: int) -> list[Row]:
    """Up to `count` records from number `start` on, of which no more is decoded than their row groups."""
    found: list[Row] = []
    before = 0
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            low, high = max(start - before, 0), min(start + count - before, rows)
            if low < high:
                found += _records(_group(file, group, row_type).slice(low, high - low), row_type)
            before += rows
    return found


def count_rows(path: Path) -> int:
    """Records of a file, from its footer alone."""
    return int(pq.read_metadata(path).num_rows)


def rows_with(path: Path, row_type: type[Row], column: str, values: Container[str]) -> Iterator[Row]:
    """The records whose `column` is one of `values`, in order; of row groups without any, only that column is decoded."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            # Compared in Python: Arrow's own way to a mask imports pandas, which is 40 MB.
            cells = file.read_row_group(group, columns=[column], use_threads=False)[column].to_pylist()
            if found := [i for i, cell in enumerate(cells) if cell in values]:
                table = _group(file, group, row_type)
                for i in found:
                    yield from _records(table.slice(i, 1), row_type)
    pa.default_memory_pool().release_unused()


def _group(file: pq.ParquetFile, group: int, row_type: type[Any]) -> pa.Table:
    return file.read_row_group(group, columns=schema(row_type).names, use_threads=False)


def _records(table: pa.Table, row_type: type[Row]) -> list[Row]:
    json_fields = _json_fields(row_type)
    return [
        row_type(**{k: json.loads(v) if k in json_fields else v for k, v in row.items()}) for row in table.to_pylist()
    ]


def give_back_memory() -> None:
    """Return what was freed to the system: allocators keep it for the next peak, which comes a little higher each time."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def read_column(path: Path, name: str) -> list[Any]:
    """One column of a file of records."""
    return pq.read_table(path, columns=[name])[name].to_pylist()  # type: ignore[no-any-return]


def write_json(path: Path, value: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; sync and rename it once it is written."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        yield partial
        sync(partial)
        partial.rename(path)
        sync(path.parent)


def make(path: Path) -> None:
    """Make a folder, and those above it that are missing, to stay: every new name is synced."""
    missing = [new for new in (path, *path.parents) if not new.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for new in missing:
        sync(new.parent)


@contextlib.contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success sync all of it and rename it to `target` in one step.

    What a killed writer left is thrown away first. A failure leaves no `target`.
    """
    assert not target.exists(), f"{target} exists already"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(target):
        try:
            make(partial)
            yield partial
            sync_tree(partial)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk must not stay full
            raise
        sync(target.parent)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn «no space left», the ledger's too, into a DiskError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "database or disk is full" in str(error):
            raise DiskError(
                f"the disk of {path.parent} is full",
                "free some space and run the same command again: finished stages are kept",
            ) from error
        raise


def sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(root)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_free(path: Path, needed: int) -> None:
    """Raise DiskError unless the disk of `path` has `needed` bytes free."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DiskError(
            f"the disk of {path} has {free / 1e9:.2f} GB free, the next stage needs about {needed / 1e9:.2f} GB",
            "free some space, or keep fewer policies (retention.last), then run the same command again",
        )


_hashes: dict[tuple[str, int, int, int], str] = {}
MOST_HASHES = 4096


def sha256(path: Path) -> str:
    """SHA-256 of a file; computed once for a file that has not changed (inode, size, time)."""
    stat = path.stat()
    key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _hashes:
        if len(_hashes) >= MOST_HASHES:
            _hashes.clear()
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def hash_files(root: Path, ignore: Iterable[str] = (MANIFEST,)) -> dict[str, str]:
    """SHA-256 of every file below `root` by its relative name."""
    skip = set(ignore)
    return {
        name: sha256(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and (name := path.relative_to(root).as_posix()) not in skip
    }


def verify_files(root: Path, files: dict[str, str], error: type[SelfplayError]) -> None:
    """Raise `error` naming the first file below `root` that is missing or not what its hash says."""
    for name, expected in files.items():
        if not (root / name).is_file():
            raise error(f"{root / name} is missing")
        if sha256(root / name) != expected:
            raise error(f"{root / name} is not what its manifest says (SHA-256 differs)")


def seed(*parts: object) -> int:
    """A 63-bit seed from what it is for: (run seed, round, stage, item, …)."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
