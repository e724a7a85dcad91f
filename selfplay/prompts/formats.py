"""What a row of a prompt file may look like, and the parts in which a file is read.

A source is cut into parts of a few megabytes, so that no reader ever holds more than one of them and several processes
can read one file at a time. A part is a range of bytes of a JSONL file, or a range of row groups of a Parquet file. The
rows of a Hub dataset, and those of a Parquet file whose row groups are large, are first copied into a Parquet file with
small groups (`in_small_groups`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from selfplay import seeds
from selfplay.errors import InputError
from selfplay.prompts import references
from selfplay.storage.folders import whole
from selfplay.types import Message

COLUMNS = ("prompt", "messages", "meta", "parent", "source", *references.COLUMNS)
"""What is read of a row. Other columns of a Parquet file stay on the disk."""
LINES, PARQUET = (".jsonl", ".json"), (".parquet",)
PART_BYTES = 4 << 20  # of a JSONL file
PART_ROWS = 4096  # of a Parquet file

_DIGITS = frozenset("0123456789abcdef")

Row = dict[str, Any] | str
"""A row, or in a word why it cannot be read."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a file, in order: those of the bytes first … last − 1, or of the row groups first … last − 1."""

    path: Path
    first: int
    last: int

    def rows(self, columns: Sequence[str] = COLUMNS) -> Iterator[Row]:
        """The rows of this part; of a Parquet file these columns. Raises InputError for a file that cannot be read as what
        its name says."""
        return self._of_lines() if self.path.suffix in LINES else self._of_groups(columns)

    def _of_lines(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            at = file.seek(self.first)
            while at < self.last and (raw := file.readline()):
                at += len(raw)
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError:
                    yield "invalid UTF-8"
                except (ValueError, RecursionError):
                    yield "invalid JSON"
                else:
                    yield row if isinstance(row, dict) else "not an object"

    def _of_groups(self, wanted: Sequence[str]) -> Iterator[Row]:
        with _parquet(self.path) as file:
            groups, columns = list(range(self.first, self.last)), _columns(file, wanted)
            if not columns:  # Arrow does not say how many rows without a column it has read
                yield from ({} for group in groups for _ in range(file.metadata.row_group(group).num_rows))
                return
            try:
                for batch in file.iter_batches(256, row_groups=groups, columns=columns, use_threads=False):
                    yield from batch.to_pylist()
            except (OSError, ValueError) as error:
                raise _unreadable(self.path, error) from None


def parts(path: Path) -> list[Part]:
    """All rows of a JSONL or Parquet file in parts. Raises InputError for a file that is neither."""
    if path.suffix in LINES:
        return _ranges(path)
    if path.suffix in PARQUET:
        with _parquet(path) as file:
            return _groups(path, [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
    raise InputError(f"{path} is neither JSONL nor Parquet", "name it *.jsonl or *.parquet and write it in that format")


def read_file(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file; a row that cannot be read comes as the reason (a string)."""
    for part in parts(path):
        yield from part.rows(columns)


def is_file(source: str) -> bool:
    """Whether `source` names a file of prompts; it is taken for a Hub dataset otherwise. Raises InputError for a file that is missing."""
    path = Path(source)
    if path.is_file():
        return True
    if path.suffix in LINES + PARQUET or source.startswith((".", "/")):
        raise InputError(f"{source}: no such file", "relative paths start at the working directory")
    return False


def in_small_groups(path: Path, copy: Path) -> Path:
    """`path`, or where it is a Parquet file with large row groups a copy that has small ones, written to `copy`."""
    if path.suffix not in PARQUET:
        return path
    with _parquet(path) as file:
        columns = _columns(file)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        if not columns or max(rows, default=0) <= 2 * PART_ROWS:
            return path
        if not copy.is_file():
            try:
                batches = file.iter_batches(PART_ROWS, columns=columns, use_threads=False)
                _copy((pa.Table.from_batches([batch]) for batch in batches), copy)
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from None
    return copy


def from_hub(name: str, split: str, column: str | None, copy: Path) -> Path:
    """Load a Hub dataset and copy its prompts to a Parquet file, a batch at a time. Raises InputError.

    `column` holds the prompt, a text or a list of messages; None: the dataset has the columns of a prompt file.
    """
    if copy.is_file():
        return copy
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        raise InputError(
            f"prompts.source {name!r} is no file here, and loading it from the Hub failed: {error}",
            "give a .jsonl or .parquet file, or a dataset id and a split that exist",
        ) from None
    there = rows.column_names
    if not {column or "prompt", column or "messages"} & set(there):
        asked = "neither a column prompt nor messages" if column is None else f"no column {column!r}"
        raise InputError(f"{name} has {asked}; it has {', '.join(there)}", "name the one to read in prompts.column")
    if column is None:
        wanted = [c for c in COLUMNS if c in there]
    else:
        wanted = [column, *(c for c in references.COLUMNS if c in there and c != column)]
    batches = rows.select_columns(wanted).with_format("arrow").iter(PART_ROWS)
    _copy((_named(table) if column else table for table in batches), copy)
    return copy


def _named(table: pa.Table) -> pa.Table:
    """A table whose first column has the name that a prompt file has for what is in it."""
    kind = table.schema.field(0).type
    name = "messages" if pa.types.is_list(kind) or pa.types.is_large_list(kind) else "prompt"
    return table.rename_columns([name, *table.column_names[1:]])


def _copy(tables: Iterable[pa.Table], path: Path) -> None:
    with whole(path) as partial:
        writer = None
        for table in tables:
            writer = writer or pq.ParquetWriter(partial, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=PART_ROWS)
        if writer is None:
            raise InputError(f"{path.stem} has no rows")
        writer.close()


def _ranges(path: Path) -> list[Part]:
    """Byte ranges that begin and end with a line."""
    size, starts = path.stat().st_size, [0]
    with path.open("rb") as file:
        while starts[-1] + PART_BYTES < size:
            file.seek(starts[-1] + PART_BYTES)
            file.readline()
            if file.tell() >= size:
                break
            starts.append(file.tell())
    return [Part(path, start, end) for start, end in zip(starts, [*starts[1:], size], strict=True)]


def _groups(path: Path, rows: list[int]) -> list[Part]:
    """Ranges of row groups that have about PART_ROWS rows together."""
    found, first, count = [], 0, 0
    for group, number in enumerate(rows):
        count += number
        if count >= PART_ROWS or group + 1 == len(rows):
            found.append(Part(path, first, group + 1))
            first, count = group + 1, 0
    return found


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _columns(file: pq.ParquetFile, wanted: Sequence[str] = COLUMNS) -> list[str]:
    return [name for name in wanted if name in file.schema_arrow.names]


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as Parquet: {error}")


# rows


def messages_of(row: Mapping[str, Any]) -> list[Message] | str:
    """The conversation of a row, {"prompt": str} or {"messages": […]}, or why it has none."""
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "neither prompt nor messages"
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return "a message without role and content"
    if not all(re.fullmatch(r"[A-Za-z_-]{1,32}", m["role"]) for m in messages):
        return "a role that is no word"
    clean = [{"role": m["role"], "content": m["content"]} for m in messages]
    return clean if clean[-1]["role"] == "user" else "the last message is not the user's"


def canonical(messages: list[Message]) -> str:
    """The text whose hash names a conversation; what is not ASCII is escaped."""
    return json.dumps(messages, sort_keys=True)


def prompt_id(messages: list[Message]) -> str:
    """Sixteen hexadecimal digits: the hash of a conversation, a number below 2^63."""
    return f"{seeds.derive(canonical(messages)):016x}"


def hash_of(prompt_id: str) -> int:
    """The number that a prompt_id is; −1 for a text that is none."""
    digits = len(prompt_id) == 16 and set(prompt_id) <= _DIGITS
    return int(prompt_id, 16) if digits and prompt_id < "8" else -1


def names(hashes: NDArray[np.int64]) -> list[str]:
    """The prompt_ids that belong to the numbers."""
    digits = hashes.astype(">i8").tobytes().hex()
    return [digits[i : i + 16] for i in range(0, len(digits), 16)]
