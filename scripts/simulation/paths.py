"""Files and paths in fewer steps of Python: a third of a history is spent in `pathlib`, `io` and `shutil`.

What is read, written and deleted is the same. Where something is not as usual, what stands in `pathlib` does it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from selfplay.storage import hashes

REAL: dict[str, Any] = {name: getattr(Path, name) for name in ("read_bytes", "read_text", "write_text")}
RMTREE = shutil.rmtree
MUCH = 1 << 14  # bytes that are read at once; the files of a history are smaller
NEW, JOINED, WITH_NAME = Path.__new__, PurePath.__truediv__, PurePath.with_name
PARENT = PurePath.parent.fget  # type: ignore[attr-defined]


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
    except OSError as error:
        if not (ignore_errors and isinstance(error, FileNotFoundError)):
            RMTREE(path, ignore_errors, **how)


def _empty(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


_made: dict[Any, Any] = {}
"""Paths by what they were made of. Nobody changes a path, and histories have the same ones."""


def _kept(key: Any, path: Any) -> Any:
    if len(_made) > 1 << 16:
        _made.clear()
    str(path)  # which the path keeps as `_str`
    _made[key] = path
    return path


def new(kind: Any, *parts: Any, **how: Any) -> Any:
    """As `Path(…)`."""
    if len(parts) != 1 or type(parts[0]) is not str:
        return NEW(kind, *parts, **how)
    key = kind, parts[0]
    found = _made.get(key)
    return _kept(key, NEW(kind, *parts)) if found is None else found


def joined(path: Any, name: Any) -> Any:
    """As `/`."""
    try:
        return _made[path._str, name]
    except (KeyError, AttributeError):  # nobody has asked for it yet
        return _kept((str(path), name), JOINED(path, name)) if type(name) is str else JOINED(path, name)


def parent(path: Any) -> Any:
    """As `Path.parent`."""
    try:
        return _made[path._str, PARENT]
    except (KeyError, AttributeError):
        return _kept((str(path), PARENT), PARENT(path))


def with_name(path: Any, name: str) -> Any:
    """As `Path.with_name`."""
    try:
        return _made[path._str, WITH_NAME, name]
    except (KeyError, AttributeError):
        return _kept((str(path), WITH_NAME, name), WITH_NAME(path, name))


def iterdir(path: Any) -> Iterator[Any]:
    """As `Path.iterdir`."""
    for name in os.listdir(str(path)):
        yield joined(path, name)


PLACES: list[tuple[Any, str, Any]] = [
    (Path, "read_bytes", read_bytes),
    (Path, "read_text", read_text),
    (Path, "__new__", staticmethod(new)),
    (PurePath, "__fspath__", PurePath.__str__),
    (Path, "parent", property(parent)),
    (Path, "with_name", with_name),
    (Path, "iterdir", iterdir),
    (hashes, "digest", digest),
    (Path, "__truediv__", joined),
    # As in later versions of Python: what is there is asked for without an exception.
    *(
        (Path, name, getattr(os.path, of))
        for name, of in (("exists", "exists"), ("is_file", "isfile"), ("is_dir", "isdir"), ("is_symlink", "islink"))
    ),
]
"""Where these stand: owner, name and what stands there."""
