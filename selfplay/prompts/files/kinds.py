"""What kind of file a file is: by what it begins with, and where that says nothing by its name."""

from __future__ import annotations

import json
from pathlib import Path

from selfplay.errors import InputError
from selfplay.prompts.files import streams

LINES, TEXT, VALUES, TABLE, PARQUET, ARROW = "lines", "text", "values", "table", "parquet", "arrow"
NAMES = {
    LINES: "JSON Lines", TEXT: "a text a line", VALUES: "JSON", TABLE: "CSV", PARQUET: "Parquet", ARROW: "Arrow",
}  # fmt: skip
SUFFIXES = {
    ".jsonl": LINES, ".ndjson": LINES, ".jsonlines": LINES, ".json": LINES, ".parquet": PARQUET, ".pq": PARQUET,
    ".arrow": ARROW, ".feather": ARROW, ".ipc": ARROW, ".csv": TABLE, ".tsv": TABLE, ".tab": TABLE, ".psv": TABLE, ".txt": TEXT, "": TEXT,
}  # fmt: skip
MOST_BYTES = 16 << 20  # of a first line that is looked at
PACKED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
FOREIGN = {
    b"PK\x03\x04": ("a ZIP archive or an Excel sheet", "unpack it, or save the sheet as CSV"),
    b"SQLite format 3": ("an SQLite database", "export its table as CSV or JSON Lines"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch the file: git lfs pull"),
    b"<!DOCTYPE html": (
        "a page in HTML",
        "fetch the file itself: its address is behind the download button of that page",
    ),
    b"<html": ("a page in HTML", "fetch the file itself: its address is behind the download button of that page"),
    b"\x80\x04\x95": ("a Python pickle", "write its rows as JSON Lines or Parquet"),
    b"%PDF": ("a PDF document", "write its texts as JSON Lines"),
}
"""How files begin that hold no rows, what they are, and what to do."""


def suffix(path: Path) -> str:
    """The suffix that says what a file holds, in small letters; that of a compression is passed over."""
    names = [name.lower() for name in path.suffixes[-2:]]
    if names and names[-1] in PACKED:
        names.pop()
    return names[-1] if names else ""


def is_data(path: Path) -> bool:
    """Whether the name is that of a file with rows."""
    return suffix(path) in SUFFIXES and suffix(path) != ""


def kind_of(path: Path) -> str:
    """One of the kinds above. Raises InputError for a file that holds no rows."""
    start = streams.head(path)
    for magic, (what, hint) in FOREIGN.items():
        if start.lstrip()[: len(magic)].lower() == magic.lower():
            raise InputError(f"{path} is {what}", hint)
    if is_packed(start):
        with streams.opened(path) as content:
            start = content.read(streams.HEAD)
        if start.startswith((b"PAR1", b"ARROW1")):
            raise InputError(
                f"{path} is a compressed {'Parquet' if start[:1] == b'P' else 'Arrow'} file", "decompress it first"
            )
        if start[257:262] == b"ustar":
            raise InputError(f"{path} is an archive of files", "unpack it, and name the folder")
    if start.startswith(b"PAR1"):
        return PARQUET
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return ARROW
    named = SUFFIXES.get(suffix(path))
    if named is None or (named in (LINES, TEXT, TABLE) and b"\0" in start and not streams.is_wide(start)):
        known = ", ".join(sorted(name for name in SUFFIXES if name))
        raise InputError(
            f"{path} is neither text nor Parquet nor Arrow", f"files with these names are read: {known}, compressed too"
        )
    if named in (PARQUET, ARROW):
        return named  # it does not begin as one: the reader says so
    if named == TABLE:
        return TABLE
    found = _json_kind(start.removeprefix(streams.BOM).lstrip(), TEXT if named == TEXT else LINES)
    return LINES if found == VALUES and len(start) >= streams.HEAD - 64 and _goes_on(path) else found


def is_packed(start: bytes) -> bool:
    """Whether a file that begins so has to be read from its beginning."""
    return streams.packing(start) is not None or streams.is_wide(start)


def _json_kind(start: bytes, otherwise: str) -> str:
    """Whether a text is a value a line, one value of many lines, or something else."""
    if start[:1] not in (b"{", b"[", b'"'):
        return otherwise
    lines = start.split(b"\n")
    whole = (
        [line for line in lines[:-1] if line.strip()]
        if len(start) >= streams.HEAD - 64
        else [line for line in lines if line.strip()]
    )
    if not whole:
        return VALUES  # a line longer than what was looked at
    first = whole[0].strip()
    if _is_value(first):
        return VALUES if len(whole) == 1 and first[:1] in (b"[", b"{") else LINES
    if first[:1] == b'"':
        return otherwise
    if first[:1] == b"[" or first[-1:] in (b"{", b"[", b","):
        return VALUES
    return LINES if otherwise == LINES and any(map(_is_value, whole[1:6])) else VALUES if _is_open(first) else otherwise


def _goes_on(path: Path) -> bool:
    """Whether the first line of a file is a whole value and more follow: rows that are longer than what was looked at."""
    with streams.opened(path) as content:
        first = content.readline(MOST_BYTES)
        return first.endswith(b"\n") and _is_value(first) and bool(content.read(64).strip())


def _is_value(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict | list | str)
    except (ValueError, RecursionError):
        return False


def _is_open(line: bytes) -> bool:
    """Whether a line is the beginning of a value that goes on in the next line."""
    return line in (b"{", b"[") or line[-1:] in (b"{", b"[", b",", b":")
