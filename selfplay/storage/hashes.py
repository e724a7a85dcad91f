"""SHA-256 of files, remembered for an hour, and only as long as a file does not change.

A disk may damage a file without another time of change. So what a service of weeks uses again is read again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from selfplay.errors import SelfplayError
from selfplay.storage.folders import MANIFEST, files_below

MOST_REMEMBERED = 4096
REMEMBERED = 3600.0  # seconds, from the beginning of the reading
THREADS = min(4, os.cpu_count() or 1)  # files that are read and hashed at a time: one cannot keep up with a fast disk

# Not the name of a file: one whose folder was renamed is not read again.
Identity = tuple[int, int, int, int, int]
_remembered: dict[Identity, tuple[float, str]] = {}  # when a file was read, and its SHA-256


def sha256(path: Path) -> str:
    """SHA-256 of a file. A file that was hashed before and has not changed since is not read again."""
    return _of(path, identity(path))


def _of(path: Path, known: Identity) -> str:
    """SHA-256 of a file that is known by this."""
    found = _remembered_of(known)
    if found is None:
        if len(_remembered) >= MOST_REMEMBERED:
            _remembered.clear()
        began = time.monotonic()
        found = digest(path)
        _remembered[known] = began, found
    return found


def _remembered_of(known: Identity) -> str | None:
    found = _remembered.get(known)  # asked once: another thread may forget all of them at any moment
    return found[1] if found is not None and time.monotonic() - found[0] < REMEMBERED else None


def digest(path: Path) -> str:
    """SHA-256 of a file, which is read for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def forget() -> None:
    """Forget every hash, so that files are read again."""
    _remembered.clear()


def sha256_of(paths: Iterable[Path]) -> list[str]:
    """SHA-256 of each file, in order. Several files that are not remembered are read at a time."""
    files = [(path, identity(path)) for path in paths]
    unknown = {path: known for path, known in files if _remembered_of(known) is None}
    found: dict[Path, str] = {}
    if len(unknown) > 1:
        with ThreadPoolExecutor(min(THREADS, len(unknown))) as pool:
            found = dict(zip(unknown, pool.map(_of, unknown, unknown.values()), strict=True))
    return [found.get(path) or _of(path, known) for path, known in files]


def hash_files(root: Path, ignore: Iterable[str] = (MANIFEST,)) -> dict[str, str]:
    """SHA-256 of every file below `root` by its relative name."""
    above = len(os.path.join(root, ""))
    names = sorted({entry.path[above:] for entry in files_below(root)}.difference(ignore))
    return dict(zip(names, sha256_of(root / name for name in names), strict=True))


def of_weights(files: Mapping[str, str]) -> str:
    """One SHA-256 over the files of weights among those of a manifest (name → SHA-256)."""
    found = (sha256 for name, sha256 in sorted(files.items()) if name.endswith(".safetensors"))
    return hashlib.sha256("".join(found).encode()).hexdigest()


def verify_files(root: Path, files: Mapping[str, str], error: type[SelfplayError], anew: bool = False) -> None:
    """Raise `error` naming the first file below `root` that is missing or is not what its hash says.

    anew: read them all, whatever is remembered. A disk may damage a file without another time of change.
    """
    for name in files:
        if not (root / name).is_file():
            raise error(f"{root / name} is missing")
        if anew:
            _remembered.pop(identity(root / name), None)
    for (name, expected), found in zip(files.items(), sha256_of(root / name for name in files), strict=True):
        if found != expected:
            raise error(f"{root / name} is not what its manifest says (SHA-256 differs)")


def identity(path: Path) -> Identity:
    """What a file is known by: device, inode, size (bytes), and when its content and it itself changed last (ns).

    The first time can be set, and copies put back the one of their source. The second one is the kernel's.
    """
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
