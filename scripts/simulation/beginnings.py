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
NOWHERE = "", 0


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

    def clear(self, path: str) -> bool:
        """Empty a folder that may have become another one since it was laid. False where it has what this one has, and nothing else:
        then it is left as it is. Of a folder that is emptied, those in it that are as they were wait for the next history."""
        rest, same = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    rest.append((entry.path, self.files.get(entry.name, NOWHERE)[1] == entry.inode()))
                elif (folder := self.folders.get(entry.name)) is None:
                    REMOVE(entry.path)
                elif folder.clear(entry.path):
                    os.rmdir(entry.path)
                else:
                    same.append((entry.path, folder))
        if (
            not self.links
            and len(rest) == len(self.files)
            and len(same) == len(self.folders)
            and all(kept for _, kept in rest)
        ):
            return False
        for file, _ in rest:
            os.unlink(file)
        for inner, folder in same:
            os.rename(inner, folder.waits)
            folder.waiting = True
        return True


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
        self.folder.clear(str(root))
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
