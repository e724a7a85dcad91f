"""CSV and its relatives: a header, then a row a line or several. Every cell stays the text that it is."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from selfplay.errors import InputError
from selfplay.prompts.formats import Row

DELIMITERS = ",\t;|"
LONGEST = 1 << 26  # characters of a cell


def rows(stream: BinaryIO, path: Path) -> Iterator[Row]:
    """The rows of a file with a header. Raises InputError where the header names a column twice."""
    csv.field_size_limit(LONGEST)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    header_line = text.readline()
    while header_line and not header_line.strip():
        header_line = text.readline()
    if not header_line:
        return
    declared = re.fullmatch(r"sep=(.)\s*", header_line)  # as Excel writes it
    if declared:
        header_line = text.readline()
    guess = max(DELIMITERS, key=lambda one: len(_cells(header_line, one)))
    delimiter = declared[1] if declared else guess
    reader = csv.reader(_with(header_line, text), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise InputError(
            f"{path} has no header that can be read: {error}", "its first line has to name the columns"
        ) from None
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise InputError(f"{path} names the column {min(twice)!r} twice", "give each column a name of its own")
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                why = f"{path}: a quoted cell that begins in line {line:,} or later has no end"
                raise InputError(why, "close its quotes") from None
            yield f"a broken CSV row ({error})"
            continue
        if not any(cells):
            continue
        if len(cells) > len(header):
            yield "more cells than the header names"
        elif any("\udc80" <= mark <= "\udcff" for cell in cells if not cell.isascii() for mark in cell):
            yield "invalid UTF-8"
        else:
            yield {name: cell for name, cell in zip(header, cells, strict=False) if cell}


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error:
        return []


def _with(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
