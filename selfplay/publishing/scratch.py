"""Where a command puts a model before it uploads it: a folder in the run folder, which has room for weights.

The command holds a lock of the kernel on its folder. So whoever works in the run folder can tell what a killed one has left
from what one is just using, although the command does not take the lock of the run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selfplay.storage import folders

PREFIX = ".export-"
SERVICE = ".publish"
"""That of the run itself, which has the lock of the run."""


@contextlib.contextmanager
def folder(run_dir: Path) -> Iterator[Path]:
    """A folder that is removed at the end. What killed commands have left goes first."""
    sweep(run_dir)
    while True:
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=run_dir))
        with contextlib.suppress(FileNotFoundError):  # another command has swept it before it had its lock
            held = os.open(made, os.O_RDONLY)
            with contextlib.suppress(OSError):  # without locks nothing is swept either
                fcntl.flock(held, fcntl.LOCK_EX)
            if made.is_dir():
                break
            os.close(held)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(held)


def left(run_dir: Path) -> Iterator[Path]:
    """The folders of commands that were killed. On a file system without locks nobody can tell, and there are none."""
    for path in sorted(path for path in folders.inside(run_dir) if path.name.startswith(PREFIX)):
        try:
            held = os.open(path, os.O_RDONLY)
        except OSError:  # it has gone meanwhile
            continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except OSError:
            continue
        finally:
            os.close(held)


def sweep(run_dir: Path) -> None:
    """Delete what killed commands have left."""
    for path in left(run_dir):
        shutil.rmtree(path, ignore_errors=True)


def sweep_all(run_dir: Path) -> None:
    """What the run itself has left too. The caller holds the lock of the run, and none of its children lives."""
    sweep(run_dir)
    shutil.rmtree(run_dir / SERVICE, ignore_errors=True)
