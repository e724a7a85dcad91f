"""The folders that histories begin with, and how each is laid out anew in few steps.

A history begins with links to files that are kept. No file of a run is changed in place, so a folder that a history has left with
the same files has what it began with: it waits beside them for the next history, which moves it to its place. What is there, and
in which order a folder lists it, is the same in each history.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from simulation.disk import REMOVE
from simulation.world import NOON

LEDGER = "ledger.sqlite"  # that it is there is all that is asked of the file
LOCKS = (".lock", ".ledger.lock")


@dataclass(slots=True, kw_only=True)
class Folder:
    """A folder of a beginning, by names in it."""

    waits: str
    """Where it waits for the next history."""
    waiting: bool = False
    folders: dict[str, Folder] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Where each is kept, and its inode."""
    links: dict[str, str] = field(default_factory=dict)

    def is_at(self, path: str) -> bool:
        """Whether a folder has what this one has, and nothing else."""
        with os.scandir(path) as entries:
            there = {entry.name: entry for entry in entries}
        if self.links or len(there) != len(self.folders) + len(self.files):
            return False
        for name, (_, inode) in self.files.items():
            if name not in there or there[name].inode() != inode:
                return False
        return all(
            name in there and there[name].is_dir(follow_symlinks=False) and folder.is_at(f"{path}/{name}")
            for name, folder in self.folders.items()
        )

    def lay(self, path: str) -> None:
        """Make the folder, which is not there."""
        if self.waiting:
            os.rename(self.waits, path)
            self.waiting = False
            return
        os.mkdir(path)
        for name, folder in self.folders.items():
            folder.lay(f"{path}/{name}")
        for name, (kept, _) in self.files.items():
            os.link(kept, f"{path}/{name}")
        for name, target in self.links.items():
            os.symlink(target, f"{path}/{name}")

    def save(self, path: str) -> None:
        """Have the folders in this one wait that are as they were."""
        for name, folder in self.folders.items():
            inner = f"{path}/{name}"
            if not os.path.isdir(inner):
                continue
            if folder.is_at(inner):
                os.rename(inner, folder.waits)
                folder.waiting = True
            else:
                folder.save(inner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A folder that a killed service left, and its ledger."""

    ledger: sqlite3.Connection
    folder: Folder
    now: datetime = NOON

    def lay(self, root: Path) -> None:
        """Make the folder of a run anew."""
        REMOVE(root, ignore_errors=True)
        self.folder.lay(str(root))
        (root / LEDGER).write_bytes(b"in memory")
        for name in LOCKS if self.folder.folders else ():
            (root / name).touch()

    def clear(self, root: Path) -> None:
        """Delete the folder of a history that has ended."""
        self.folder.save(str(root))
        REMOVE(root, ignore_errors=True)


def listed(kept: Path, waits: Path) -> Folder:
    """The folder `kept`, whose folders wait in `waits`, which is made."""
    waits.mkdir()
    numbers = itertools.count()

    def look(path: Path) -> Folder:
        found = Folder(waits=str(waits / str(next(numbers))))
        for inner in sorted(path.iterdir()):
            if inner.is_symlink():
                found.links[inner.name] = os.readlink(inner)
            elif inner.is_dir():
                found.folders[inner.name] = look(inner)
            elif inner.name not in (*LOCKS, LEDGER):
                found.files[inner.name] = str(inner), inner.stat().st_ino
        return found

    return look(kept)
