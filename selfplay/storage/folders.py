"""Durable files and folders: each is there whole or not at all, whatever ends the process that writes it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfplay.errors import DiskError, InputError
from selfplay.storage import fences

MANIFEST = "manifest.json"


def write_json(path: Path, value: Any) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; sync and rename it once it is written."""
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        yield partial
    finish(partial, path)


def finish(partial: Path, path: Path) -> None:
    """Sync a file that is written and give it its name."""
    with disk_errors(path):
        sync(partial)
        fences.check(path)
        partial.rename(path)
        sync(path.parent)


def make(path: Path) -> None:
    """Make a folder, and those above it that are missing, to stay: every new name is synced."""
    missing: list[Path] = []
    above = path
    while not above.is_dir() and above.parent != above:
        missing.append(above)
        above = above.parent
    fences.check(path)
    for new in reversed(missing):  # one by one: what was moved away in between is not made anew
        new.mkdir(exist_ok=True)
        sync(new.parent)


@contextlib.contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success sync all of it and rename it to `target` in one step.

    What a killed writer left is thrown away first. A failure leaves no `target`.
    """
    assert not target.exists(), f"{target} exists already"
    partial = target.with_name(f".{target.name}.partial")
    with disk_errors(target):
        delete(partial)
        try:
            make(partial.parent)
            partial.mkdir()  # not synced: a name that is to go
            yield partial
            sync_tree(partial)
            fences.check(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk must not stay full
            raise
        sync(target.parent)


def inside(path: Path) -> list[Path]:
    """What lies in a folder; nothing where it is not there."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return list(path.iterdir())
    return []


def files_below(root: str | Path) -> Iterator[os.DirEntry[str]]:
    """The files in a folder and in those below it, also where there are links to files."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from files_below(entry.path)
            elif entry.is_file():
                yield entry


def delete(path: Path) -> None:
    """Delete a folder with all that is in it, or a file, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class disk_errors:
    """Turn «no space left», the ledger's too, into a DiskError, and what the file system refuses beside or below `path` into an
    InputError, or into a DiskError where it may pass by itself."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and (found := _for_users(error, self._path)) is not None:
            raise found from error


def _for_users(error: Exception, path: Path) -> DiskError | InputError | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "database or disk is full" in str(error):
        hint = "free some space and run the same command again: finished stages are kept"
        return DiskError(f"the disk of {path.parent} is full", hint)
    if not isinstance(error, OSError):
        return None
    fences.check(path)  # where the folder is not this process's any more, that is the error
    return _refused(error, path.parent)


REFUSALS = {
    errno.EROFS: "its file system is mounted read-only: mount it for writing, or choose another run folder (--run-dir)",
    errno.EACCES: "let the user of this process own the folder and all that is in it (chown -R), or choose another one (--run-dir)",
    errno.EPERM: "see whether it is immutable (lsattr, chattr -i) and whose it is; a file system that refuses this altogether cannot "
    "hold a run (docs/operations.md, File systems)",
    errno.ENOTDIR: "move the file away that stands where the run has a folder",
    errno.EEXIST: "move away what stands where the run has a folder",
    errno.EISDIR: "move the folder away that stands where the run has a file",
    errno.ENOLCK: "set run.locks: lease, or choose a folder on a local disk (docs/operations.md, File systems)",
}
NOT_THERE = "choose a folder on a local disk (docs/operations.md, File systems)"
for _number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV, errno.EMLINK):
    REFUSALS[_number] = NOT_THERE
PASSING = (
    errno.EBUSY,
    errno.ENOTEMPTY,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
    errno.EREMOTEIO,
)


def _refused(error: OSError, root: Path) -> DiskError | InputError | None:
    """The error of a user for what the file system refused below `root`; None for all other errors."""
    if not isinstance(error.filename, (str, os.PathLike)) or error.errno is None:
        return None
    where = os.path.abspath(error.filename)
    if not (where + os.sep).startswith(os.path.abspath(root) + os.sep):
        return None
    if error.errno in PASSING:
        hint = "see whether the disk or the server of the file system is in order, then run the same command again"
        return DiskError(f"{where}: {error.strerror}", hint)
    if error.errno in REFUSALS:
        return InputError(f"{where} cannot be written: {error.strerror}", REFUSALS[error.errno])
    return None


def sync_tree(root: Path) -> None:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                sync_tree(Path(entry.path))
            elif not entry.is_symlink():
                sync(Path(entry.path))
    sync(root)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
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
