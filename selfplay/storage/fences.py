"""Fences: what a process asks each time, before it makes something durable in a run folder that it has for itself.

The lock of a folder puts up its fence here. `folders` asks before each rename, `ledger` at each transaction. A process that
no longer has the folder is so stopped before its next write, wherever in the code that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_fences: dict[str, Callable[[], None]] = {}


def put_up(folder: Path, fence: Callable[[], None]) -> None:
    """Have `fence` asked before each write below a folder; it raises LockLost."""
    _fences[os.path.abspath(folder)] = fence


def take_down(folder: Path, fence: Callable[[], None]) -> None:
    """Ask it no more."""
    if _fences.get(os.path.abspath(folder)) == fence:
        del _fences[os.path.abspath(folder)]


def check(path: Path) -> None:
    """Ask the fences of the folders that a path lies in. Raises LockLost."""
    here = os.path.abspath(path)
    for folder, fence in list(_fences.items()):
        if here.startswith(folder + os.sep) or here == folder:
            fence()
