"""The lock of a run folder: whoever holds it is the folder's only runner."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from selfplay.errors import InputError
from selfplay.storage import filesystem


class RunLock:
    """The right to run in a folder. One process holds it at a time, and the kernel releases it however that process ends.

    Entering makes the folder. Raises InputError where the folder cannot be made, or where another process holds the lock.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._file: IO[str]

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self._path.parent} cannot be a run folder: {error}", "choose another one (--run-dir)"
            ) from None
        if not self._path.exists():  # the first process in this folder asks what the file system can do
            filesystem.require(self._path.parent)
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            text = self._file.read()
            self._file.close()
            raise InputError(
                f"{self._path.parent} is in use by {_holder(text)}",
                "wait for it or end it; another run needs another folder",
            ) from None
        filesystem.clean(self._path.parent)
        self._file.seek(0)
        self._file.truncate()
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, self._file
        )
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _holder(text: str) -> str:
    """Who wrote the lock file, in words."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError):
        return "another process"
