"""How SQLite opens the files of a run: with the locks and the shared memory of the kernel, or, in a folder that is held by a
lease, without both.

Without them a lock is a folder beside the file (`ledger.sqlite.lock`, SQLite's `unix-dotfile`), which any file system can make
for one process alone. The write-ahead log needs shared memory, so the old pages are kept in a journal instead. Each transaction
takes the lock and lets it go, so page, API and command line read and give orders as elsewhere. What a killed process leaves is
broken by the next runner, once it has the lease.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from selfplay.storage import lease

STILL = 10.0  # seconds for which a lock has to stand still: it is held for a transaction, which takes parts of a second


def uri(path: Path, mode: Literal["rw", "rwc"] = "rwc") -> str:
    """The URI by which `sqlite3.connect(…, uri=True)` opens a file that lies in a run folder, or in a folder of that.

    mode: `rw` for a file that has to be there.
    """
    return f"file:{quote(str(path.absolute()))}?mode={mode}" + ("&vfs=unix-dotfile" if by_lease(path) else "")


def set_journal(connection: Any, path: Path) -> None:
    """Choose the journal of a connection to the file `path` that was just opened."""
    if not by_lease(path):
        connection.execute("PRAGMA journal_mode=WAL")
        return
    if _has_log(path) and not _closed_for_all(path):
        # One connection alone can open it without shared memory, and lets the lock go at its next read.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=TRUNCATE")
        connection.execute("PRAGMA locking_mode=NORMAL")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    connection.execute("PRAGMA journal_mode=TRUNCATE")


def _closed_for_all(path: Path) -> bool:
    """End the write-ahead log of a file by the locks of the kernel; False where there are none. Raises OperationalError
    («locked») where another process has the file open still: it would not see our locks, and write over what we write."""
    if not _has_locks(path.parent):
        return False
    since = time.monotonic()
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=rw", uri=True)) as plain:
        while True:
            try:
                plain.execute("PRAGMA journal_mode=TRUNCATE")
                return True
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    return False  # no shared memory
                if time.monotonic() - since > STILL:
                    raise
            time.sleep(0.1)


def _has_locks(folder: Path) -> bool:
    """Whether bytes of a file can be locked. Where not, SQLite says «locked» for some of the errors (ENOLCK)."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def is_new(path: Path) -> bool:
    """Whether nothing was written to a file yet."""
    return not path.exists() or path.stat().st_size == 0


def by_lease(path: Path) -> bool:
    """Whether a file lies in a folder that is held by a lease, or in a folder of that."""
    folder = path.absolute().parent
    return lease.is_used(folder) or lease.is_used(folder.parent)


def _has_log(path: Path) -> bool:
    """Whether a file was last written with a write-ahead log: its header says so (SQLite's file format, bytes 18 and 19)."""
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\x02\x02"


def break_locks(run_dir: Path) -> None:
    """Remove the locks that killed processes left in a folder. Only for the runner that holds the lease."""
    for lock in (*run_dir.glob("*.sqlite.lock"), *run_dir.glob("reward/*.sqlite.lock")):
        seen, since = _changed(lock), time.monotonic()
        while seen is not None and time.monotonic() - since < STILL:
            time.sleep(0.1)
            if (now := _changed(lock)) != seen:
                seen, since = now, time.monotonic()
        if seen is not None:
            shutil.rmtree(lock, ignore_errors=True)


def _changed(lock: Path) -> tuple[int, int] | None:
    """Which lock it is and when it changed; None where there is none any more."""
    try:
        found = lock.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
