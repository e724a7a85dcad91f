"""Log files of processes: they stay short, and their last line tells why a process failed."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

LARGEST_LOG = 16 << 20  # In bytes. A log that grows longer begins anew, and its end stays as `<name>.1`.
LOG_SECONDS = 1.0  # The time between two looks at the log of a child that runs.


def open_log(log: Path) -> BinaryIO:
    """Open a log to append to it. A link that somebody has put in its place is removed: what it leads to is no log of ours."""
    if log.is_symlink():
        log.unlink()
    return os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666), "ab")


def bound_log(log: Path) -> None:
    """Empty a log that has grown too long, and keep its end beside it. A link is left alone, with what it leads to.

    The file is truncated and not renamed, so a process that appends to it can go on.
    """
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # The log may not exist yet.
        source = stack.enter_context(os.fdopen(os.open(log, os.O_RDWR | os.O_NOFOLLOW), "rb"))
        size = os.fstat(source.fileno()).st_size
        if size <= LARGEST_LOG:
            return
        try:
            earlier = log.with_name(f"{log.name}.1")
            earlier.unlink(missing_ok=True)
            kept = stack.enter_context(earlier.open("xb"))
            os.sendfile(kept.fileno(), source.fileno(), size - LARGEST_LOG, LARGEST_LOG)
        finally:  # On a full disk the end of the log is lost, but the log must make room all the same.
            os.ftruncate(source.fileno(), 0)


def keep_bounded(log: Path, stopped: threading.Event) -> None:
    """Look at a log each second and bound it, until `stopped` is set."""
    while not stopped.wait(LOG_SECONDS):
        bound_log(log)


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, for an error message."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
