"""Hashes that a file carries itself: JSON in a key of its own, shards in a small file beside them.

A stage or a policy is known to be whole by its manifest. These are for what counts before there is a manifest (shards of a
stage that is under way), for what has none, and for manifests themselves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfplay.errors import DamagedError
from selfplay.storage import folders, hashes

SEAL = "sha256"
"""Key of a sealed JSON file: the hash of all its other keys and values."""
BESIDE = ".sha256"
"""Behind the name of a sealed file: the file with its hash."""

EARLIER = "earlier.json"
"""In a folder of sealed files: the hashes of those that an earlier version has left there without one, by name. It is written
before the first file there is sealed."""

MOST_KNOWN = 64
_known: dict[bytes, None] = {}
"""Contents of JSON files that are what their own hash says. The same bytes are not hashed again: manifests are read often."""
_repairs: deque[str] = deque()


def note_repair(text: str) -> None:
    """Say that something damaged was dropped, to be made again. Any thread may; whoever has the ledger records it."""
    _repairs.append(text)


def repairs() -> list[str]:
    """What was said so since the last call."""
    found = []
    with contextlib.suppress(IndexError):  # another thread may have taken the last one
        while _repairs:
            found.append(_repairs.popleft())
    return found


# JSON


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a mapping with its hash, whole or not at all."""
    assert SEAL not in value, "the key is the seal's"
    folders.write_json(path, {**value, SEAL: _hash(json.loads(json.dumps(value)))})


def read_json(path: Path, fields: Collection[str] | None) -> dict[str, Any]:
    """Read what `write_json` has written. Raises DamagedError where it is another, FileNotFoundError where it is gone.

    fields: the keys that it may have; None: any, for mappings. A file of an earlier version has no hash. One that has other
    keys, or a text among its mappings, is no such file.
    """
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except ValueError as error:
        raise DamagedError(path, f"it is no JSON any more ({error})") from error
    if not isinstance(found, dict):
        raise DamagedError(path, "it holds no mapping")
    seal = found.pop(SEAL, None)
    if seal is None and _is_older(found, fields):
        return found
    if raw not in _known:
        if seal != _hash(found):
            raise DamagedError(path, "its content is not what its own SHA-256 says")
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[raw] = None
    return found


def _is_older(found: dict[str, Any], fields: Collection[str] | None) -> bool:
    """Whether a file without a hash may be of an earlier version."""
    return found.keys() <= set(fields) if fields is not None else all(isinstance(v, dict) for v in found.values())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


# files


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """As `folders.whole`, with the hash of the file beside it. For folders that no earlier version has written to."""
    partial = path.with_name(f".{path.name}.partial")
    with folders.disk_errors(path):
        yield partial
    finish(partial, path, earlier=False)


def finish(partial: Path, path: Path, earlier: bool = True) -> None:
    """Give a file that is written its name, as `folders.finish`, with its hash beside it.

    The hash is not synced: where a power cut takes it, the file counts as damaged, and is made again. earlier: whether there
    may be files beside it that an earlier version has left without hashes.
    """
    with folders.disk_errors(path):
        if earlier:
            _list_earlier(path.parent)
        beside(path).write_text(hashes.digest(partial), encoding="ascii")
        folders.finish(partial, path)


def seal(path: Path) -> None:
    """Put the hash of a file beside it that has its name already, and that is made again where a kill leaves it without."""
    _list_earlier(path.parent)
    beside(path).write_text(hashes.digest(path), encoding="ascii")


def is_sealed(path: Path, anew: bool = True, earlier: bool = True) -> bool:
    """Whether a file is there and is what its hash says. What an earlier version has left without one counts as it was when
    the first file beside it was sealed, and before that as it is.

    anew: read it, whatever is remembered of it. earlier: whether an earlier version may have left it.
    """
    try:
        found = hashes.digest if anew else hashes.sha256
        return path.is_file() and beside(path).read_text(encoding="ascii").strip() == found(path)
    except FileNotFoundError:
        if not earlier:
            return False
        if (listed := path.with_name(EARLIER)).is_file():
            with contextlib.suppress(DamagedError):
                return bool(read_json(listed, None).get(path.name) == hashes.digest(path))
            return False
        return not any(path.parent.glob(f"*{BESIDE}"))
    except UnicodeDecodeError:
        return False


@functools.lru_cache(64)
def _list_earlier(folder: Path) -> None:
    """Write EARLIER where a folder has files and none of them is sealed. It is asked for at every file, and looks once."""
    if (folder / EARLIER).exists() or any(folder.glob(f"*{BESIDE}")):
        return
    if files := sorted(folder.glob("*.parquet")):
        write_json(folder / EARLIER, {path.name: hashes.digest(path) for path in files})


def is_whole(path: Path, earlier: bool = True) -> bool:
    """The same, for a file that can be made again: a damaged one is deleted, and told (`repairs`)."""
    if not path.exists():
        return False
    if is_sealed(path, earlier=earlier):
        return True
    path.unlink()
    beside(path).unlink(missing_ok=True)
    note_repair(f"{path} was damaged and is made again")
    return False


def beside(path: Path) -> Path:
    """The file with the hash of a sealed file."""
    return path.with_name(path.name + BESIDE)
