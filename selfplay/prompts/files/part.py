"""The parts in which files are read.

A file is cut into parts of a few megabytes, so that no reader ever holds more than one of them and several processes can
read one file at a time: ranges of bytes that begin and end with a line, or ranges of row groups. A file that can only be
read from its beginning is one part; the import copies it first where it is large (`copies.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from selfplay.errors import InputError
from selfplay.prompts.files import columnar, delimited, kinds, streams
from selfplay.prompts.files.sources import local_files
from selfplay.prompts.files.values import OF_ANOTHER_SPLIT, BrokenJson, values
from selfplay.prompts.formats import DEFAULT, Found, Reading, Row
from selfplay.prompts.formats.known import WHOLE

PART_BYTES = 4 << 20  # of a file of lines
PART_ROWS = 4096  # of a Parquet file
COPIED = "copied"
"""The kind of a copy that the import makes: a line a row, as {"row": …}, or {"why": …} for one that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some rows of a file, in order: those of the bytes first … last − 1, of the row groups first … last − 1, or all."""

    path: Path
    kind: str
    first: int = 0
    last: int | None = None
    reading: Reading = DEFAULT
    split: str = "train"

    def rows(self) -> Iterator[Row]:
        """The rows of this part. Raises InputError for a file that cannot be read as what it seems to be."""
        if self.kind == kinds.PARQUET:
            yield from columnar.rows(columnar.parquet_batches(self.path, self.reading, self.first, self.last))
        elif self.kind == kinds.ARROW:
            yield from columnar.rows(columnar.arrow_batches(self.path, self.reading))
        elif self.last is None:
            with streams.opened(self.path) as stream:
                yield from self._of_stream(stream)
        else:
            with self.path.open("rb") as file:
                file.seek(self.first)
                for raw in _lines(file, self.last - self.first):
                    yield _row(raw, self.kind)

    def read(self) -> Iterator[Found | str]:
        """What each row asks, or why it asks nothing."""
        for row in self.rows():
            yield row if isinstance(row, str) else self.reading.read(row)

    def _of_stream(self, stream: BinaryIO) -> Iterator[Row]:
        if self.kind == kinds.TABLE:
            yield from delimited.rows(stream, self.path)
        elif self.kind == kinds.VALUES:
            count = 0
            try:
                for count, value in enumerate(values(stream, self.split), 1):  # noqa: B007
                    yield row_of(value)
            except BrokenJson as error:
                raise InputError(
                    f"{self.path} is no valid JSON after {count:,} rows: {error}",
                    "mend it there, or fetch it again: it may be cut off",
                ) from None
        else:
            for raw in _lines(stream, None):
                yield _row(raw, self.kind)


def row_of(value: Any) -> Row:
    """The row that a value of JSON is."""
    if value is OF_ANOTHER_SPLIT:
        return "of another split (prompts.split)"
    if isinstance(value, dict):
        return value
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict | list | str)):
        return {WHOLE: value}
    return "not an object"


def parts(path: Path, reading: Reading = DEFAULT, split: str = "train") -> list[Part]:
    """All rows of a file in parts. Raises InputError for a file that holds no rows."""
    kind = kinds.kind_of(path)
    if kind == kinds.PARQUET:
        return _groups(path, columnar.groups(path), reading)
    if kind in (kinds.LINES, kinds.TEXT) and not kinds.is_packed(streams.head(path)):
        return ranges(path, kind, reading)
    return [Part(path=path, kind=kind, reading=reading, split=split)]


def all_parts(source: str, reading: Reading = DEFAULT, split: str = "train", config: str | None = None) -> list[Part]:
    """All rows of a file, a folder or a glob in parts. Raises InputError."""
    found = local_files(source, split, config)
    return [one for path in found.paths for one in parts(path, reading, split)]


def read_file(path: Path, reading: Reading = DEFAULT) -> Iterator[Row]:
    """The rows of a file; a row that cannot be read comes as the reason (a string). Raises InputError."""
    for part in parts(path, reading):
        yield from part.rows()


def ranges(path: Path, kind: str, reading: Reading) -> list[Part]:
    """Byte ranges that begin and end with a line."""
    size, starts = path.stat().st_size, [0]
    with path.open("rb") as file:
        while starts[-1] + PART_BYTES < size:
            file.seek(starts[-1] + PART_BYTES)
            file.readline()
            if file.tell() >= size:
                break
            starts.append(file.tell())
    return [
        Part(path=path, kind=kind, first=start, last=end, reading=reading)
        for start, end in zip(starts, [*starts[1:], size], strict=True)
    ]


def _groups(path: Path, rows: list[int], reading: Reading) -> list[Part]:
    """Ranges of row groups that have about PART_ROWS rows together."""
    found, first, count = [], 0, 0
    for group, number in enumerate(rows):
        count += number
        if count >= PART_ROWS or group + 1 == len(rows):
            found.append(Part(path=path, kind=kinds.PARQUET, first=first, last=group + 1, reading=reading))
            first, count = group + 1, 0
    return found


def _lines(file: BinaryIO, length: int | None) -> Iterator[bytes]:
    """The lines that are not blank, of so many bytes."""
    at = 0
    while (length is None or at < length) and (raw := file.readline()):
        at += len(raw)
        if raw.strip():
            yield raw


def _row(raw: bytes, kind: str) -> Row:
    try:
        text = raw.removeprefix(streams.BOM).decode("utf-8")
    except UnicodeDecodeError:
        return "invalid UTF-8"
    if kind == kinds.TEXT:
        return {WHOLE: text.strip()}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _with_comma(text)
    if kind == COPIED:
        return value["row"] if "row" in value else str(value["why"])
    return row_of(value)


def _with_comma(text: str) -> Row:
    """The row of a line that ends with a comma, as in an array whose brackets were taken off."""
    start = text.rstrip()
    try:
        return row_of(json.loads(start[:-1])) if start.endswith(",") else "invalid JSON"
    except (ValueError, RecursionError):
        return "invalid JSON"
