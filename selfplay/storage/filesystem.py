"""What a run needs of the file system of its folder: locks or a lease, renames and syncs. Some network and object stores lack one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Literal

from selfplay.errors import InputError
from selfplay.storage import folders

Locks = Literal["flock", "lease"]
DISK = "put the run folder on a local disk (--run-dir), and keep copies elsewhere (docs/operations.md, File systems)"
LEASE = "set run.locks: lease, or " + DISK
FOLDERS = ("logs", "pool", "policies", "rounds", "reward", "references", ".lease")
FILES = ("ledger.sqlite", ".lock", ".ledger.lock")

SCRATCH = ".selfplay-"  # what the names of folders begin with in which something is tried


def _lock(folder: Path) -> None:
    with (folder / "lock").open("a+") as file, (folder / "lock").open("a+") as other:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise OSError("two got the same lock")


def _lock_bytes(folder: Path) -> None:
    with (folder / "ledger").open("a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)


def _share_memory(folder: Path) -> None:
    with (folder / "shared").open("wb+") as file:
        file.truncate(mmap.PAGESIZE)
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as memory:
            memory[:1] = b"x"
            memory.flush()


def _create(folder: Path) -> None:
    for make in ((folder / "claim").touch, (folder / "made").mkdir):
        make(exist_ok=False)
        try:
            make(exist_ok=False)
        except FileExistsError:
            continue
        raise OSError("two made the same")


def _replace(folder: Path) -> None:
    (folder / "current").write_text("1", encoding="utf-8")
    (folder / "next").write_text("2", encoding="utf-8")
    (folder / "next").rename(folder / "current")
    if (folder / "current").read_text(encoding="utf-8") != "2":
        raise OSError("the old file is still there")


def _rename(folder: Path) -> None:
    (folder / "partial").mkdir()
    (folder / "partial" / "file").write_text("x", encoding="utf-8")
    (folder / "partial").rename(folder / "whole")
    (folder / "whole" / "file").read_text(encoding="utf-8")


def _sync(folder: Path) -> None:
    folders.sync_tree(folder)


Need = tuple[str, Callable[[Path], None]]
LOCKS: tuple[Need, ...] = (
    ("locks of files (flock), which keep a second process out of a run", _lock),
    ("locks of bytes (fcntl), which the ledger needs", _lock_bytes),
    ("memory that processes share through a file (mmap), which the ledger needs", _share_memory),
)
CLAIMS: tuple[Need, ...] = (
    ("files and folders that only one process can create (O_EXCL, mkdir), by which a lease is claimed", _create),
)
ALWAYS: tuple[Need, ...] = (
    ("renames of a file over another in one step, as for `current`", _replace),
    ("renames of folders, by which a stage is there whole or not at all", _rename),
    ("syncs of files and folders (fsync), by which what is finished survives a power cut", _sync),
)


def lacks(there: Path, locks: Locks = "flock") -> list[tuple[str, bool]]:
    """What the file system of a folder cannot do and a run needs, with its error, and whether a lease does without it. It is
    tried in a folder that is deleted again. Raises InputError or DiskError where nothing can be written.
    """
    found = []
    with folders.disk_errors(there / "run"), contextlib.ExitStack() as at_the_end:
        try:
            scratch = at_the_end.enter_context(tempfile.TemporaryDirectory(prefix=SCRATCH, dir=there))
        except OSError as error:
            error.filename = str(there)
            raise
        for what, do in (*(LOCKS if locks == "flock" else CLAIMS), *ALWAYS):
            try:
                do(Path(scratch))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # a full disk lacks nothing else
                found.append((f"{what} ({error.strerror or error})", (what, do) in LOCKS))
    return found


def missing(there: Path, locks: Locks = "flock") -> tuple[str, str] | None:
    """What the file system of a folder lacks, as a sentence, and what to do about it; None where it has it all."""
    if not (found := lacks(there, locks)):
        return None
    said = f"the file system of {there} has no {'; no '.join(what for what, _ in found)}"
    return said, LEASE if all(by_lease for _, by_lease in found) else DISK


def odd(run_dir: Path) -> str | None:
    """What lies in a run folder under a name of the run, and is a file instead of a folder or the other way round."""
    for name in (*FOLDERS, *FILES):
        path = run_dir / name
        if path.exists() and path.is_dir() != (name in FOLDERS):
            return f"{path} is a {'folder' if path.is_dir() else 'file'}, where the run has a {'folder' if name in FOLDERS else 'file'}"
    return None


def require(run_dir: Path, locks: Locks = "flock") -> None:
    """Raise InputError where a run cannot live in this folder, which may not be there yet."""
    there = next(path for path in chain([run_dir], run_dir.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise InputError(f"{run_dir} cannot be a run folder: {there} is a file", "choose another one (--run-dir)")
    if (found := odd(run_dir)) is not None:
        raise InputError(f"{run_dir} cannot be a run folder: {found}", "move it away: the run makes its own")
    if (lacking := missing(there, locks)) is not None:
        raise InputError(f"{run_dir} cannot be a run folder: {lacking[0]}", lacking[1])


def clean(folder: Path) -> None:
    """Delete what a process left that was killed while it tried. For who holds the lock of the folder."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)
