"""What a run needs of the file system of its folder: locks, links, renames and syncs. Some network and object stores lack one."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from selfplay.errors import InputError
from selfplay.storage import folders

HINT = "put the run folder on a local disk (--run-dir), and keep copies elsewhere (docs/operations.md, Back up and restore)"

SCRATCH = ".selfplay-"  # what the names of folders begin with in which something is tried


def _lock(folder: Path) -> None:
    with (folder / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock_bytes(folder: Path) -> None:
    with (folder / "ledger").open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)


def _link(folder: Path) -> None:
    (folder / "link").symlink_to("lock")
    (folder / "current").symlink_to("nothing")
    (folder / "link").rename(folder / "current")  # over the old one, in one step
    if os.readlink(folder / "current") != "lock":
        raise OSError("a link is not what it was made as")


def _rename(folder: Path) -> None:
    (folder / "partial").mkdir()
    (folder / "partial" / "file").write_text("x", encoding="utf-8")
    (folder / "partial").rename(folder / "whole")
    (folder / "whole" / "file").read_text(encoding="utf-8")


def _sync(folder: Path) -> None:
    folders.sync_tree(folder / "whole")


NEEDS: tuple[tuple[str, Callable[[Path], None]], ...] = (
    ("locks of files (flock), which keep a second process out of a run", _lock),
    ("locks of bytes (fcntl), which the ledger needs", _lock_bytes),
    ("symbolic links that are replaced in one step, as `current` is", _link),
    ("renames of folders, by which a stage is there whole or not at all", _rename),
    ("syncs of files and folders (fsync)", _sync),
)


def lacks(there: Path) -> list[str]:
    """What the file system of a folder cannot do and a run needs, with its error. It is tried in a folder that is deleted again.

    Raises OSError where nothing can be written.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=there) as scratch:
        for what, do in NEEDS:
            try:
                do(Path(scratch))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # a full disk lacks nothing else
                found.append(f"{what} ({error.strerror or error})")
    return found


def require(folder: Path) -> None:
    """Raise InputError where a run cannot live in this folder."""
    if missing := lacks(folder):
        raise InputError(f"{folder} cannot be a run folder: its file system has no {'; no '.join(missing)}", HINT)


def clean(folder: Path) -> None:
    """Delete what a process left that was killed while it tried. For who holds the lock of the folder."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
