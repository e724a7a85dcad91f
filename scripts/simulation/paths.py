"""Files and paths in fewer steps of Python: a third of a history is spent in `pathlib`, `io` and `shutil`.

What is read, written and deleted is the same. Where something is not as usual, what stands in `pathlib` does it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path, PurePath
from typing import Any

from selfplay.storage import hashes

REAL: dict[str, Any] = {name: getattr(Path, name) for name in ("read_bytes", "read_text", "write_text")}
RMTREE = shutil.rmtree
MUCH = 1 << 14  # bytes that are read at once; the files of a history are smaller
FLAVOUR: Any = type(PurePath()._flavour)  # type: ignore[attr-defined]
PARSED, JOINED = FLAVOUR.parse_parts, PurePath.__truediv__


def read_bytes(path: Path) -> bytes:
    """As `Path.read_bytes`."""
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.read(descriptor, MUCH)
        finally:
            os.close(descriptor)
    except IsADirectoryError:
        found = REAL["read_bytes"](path)
    return found if len(found) < MUCH else REAL["read_bytes"](path)


def read_text(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
    """As `Path.read_text`."""
    found = read_bytes(path)
    if b"\r" in found or not found.isascii():
        return REAL["read_text"](path, encoding, errors)  # type: ignore[no-any-return]
    return found.decode("ascii")


def write_text(path: Path, text: str, encoding: str | None = None, *rest: Any, **how: Any) -> int:
    """As `Path.write_text`."""
    if rest or how or not text.isascii():
        return REAL["write_text"](path, text, encoding, *rest, **how)  # type: ignore[no-any-return]
    descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        return os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> Path:
    """As `Path.rename`."""
    os.rename(str(path), str(target))
    return target


def digest(path: Path) -> str:
    """As `hashes.digest`, of a small file."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def remove(path: Any, ignore_errors: bool = False, **how: Any) -> None:
    """As `shutil.rmtree`, of a folder that nobody else changes."""
    try:
        _empty(os.fspath(path))
        os.rmdir(path)
    except OSError:
        RMTREE(path, ignore_errors, **how)


def _empty(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


@functools.lru_cache(1 << 14)
def _parsed(text: str) -> Any:
    return PARSED(PurePath()._flavour, [text])  # type: ignore[attr-defined]


def parse_parts(flavour: Any, parts: list[str]) -> Any:
    """As that of `pathlib`. A text is taken apart once; nobody changes the list."""
    return _parsed(parts[0]) if len(parts) == 1 else PARSED(flavour, parts)


@functools.lru_cache(1 << 14)
def _names(text: str) -> list[str] | None:
    """The parts of a relative path; None for one that has to be taken apart with more care."""
    parts = text.split("/")
    return None if "" in parts or "." in parts else parts


def joined(path: Any, name: Any) -> Any:
    """As `/`."""
    more = _names(name) if type(name) is str else None
    if more is None or len(path._parts) < 2:
        return JOINED(path, name)
    found = object.__new__(type(path))
    found._drv, found._root, found._parts = path._drv, path._root, path._parts + more
    try:
        found._str = f"{path._str}/{name}"
    except AttributeError:  # nobody has asked for it yet
        found._str = f"{path}/{name}"
    return found


PLACES: list[tuple[Any, str, Any]] = [
    (Path, "read_bytes", read_bytes),
    (Path, "read_text", read_text),
    (FLAVOUR, "parse_parts", parse_parts),
    (PurePath, "__fspath__", PurePath.__str__),
    (hashes, "digest", digest),
    (PurePath, "__truediv__", joined),
    # As in later versions of Python: what is there is asked for without an exception.
    *(
        (Path, name, getattr(os.path, of))
        for name, of in (("exists", "exists"), ("is_file", "isfile"), ("is_dir", "isdir"), ("is_symlink", "islink"))
    ),
]
"""Where these stand: owner, name and what stands there."""
