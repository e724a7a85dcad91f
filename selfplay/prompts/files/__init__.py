"""Files of prompts, whatever they are: found, opened, and read in parts.

sources.py    which files a source is     kinds.py      what kind of file a file is
part.py       the parts of a file         streams.py    compressed files and encodings
values.py     JSON of many lines          delimited.py  CSV
columnar.py   Parquet and Arrow           copies.py     copies for the import
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from selfplay.prompts.files.part import Part, parts
from selfplay.prompts.files.sources import files_of, is_local
from selfplay.prompts.formats import DEFAULT, Reading, Row

__all__ = ["Part", "all_parts", "files_of", "is_local", "parts", "read_file"]


def read_file(path: Path, reading: Reading = DEFAULT) -> Iterator[Row]:
    """The rows of a file; a row that cannot be read comes as the reason (a string). Raises InputError."""
    for part in parts(path, reading):
        yield from part.rows()


def all_parts(source: str, reading: Reading = DEFAULT, split: str = "train", config: str | None = None) -> list[Part]:
    """All rows of a file, a folder or a glob in parts. Raises InputError, for the id of a Hub dataset as well."""
    found = files_of(source, split, config)
    assert found is not None, "a Hub dataset has no files here"
    return [one for path in found.paths for one in parts(path, reading, split)]
