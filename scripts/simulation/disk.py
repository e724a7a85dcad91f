"""The boundary to the disk: every change of a file or a name is a moment, and what was not synced is lost with the power."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from simulation import paths
from simulation.world import World

REAL: dict[str, Any] = {name: getattr(Path, name) for name in ("unlink", "symlink_to", "mkdir", "touch")}
REAL["write_text"], REAL["rename"], REMOVE = paths.write_text, paths.rename, paths.remove
Undo = Callable[[], object]


class Disk:
    """The files of one history. Its methods stand where those of `Path`, `shutil` and `folders.sync` do."""

    def __init__(self, world: World) -> None:
        self._world, self._root = world, str(world.root)
        self._names: list[
            tuple[str, Undo]
        ] = []  # folder and undoing of each new name that is not synced, in their order
        self._contents: set[int] = set()  # inodes of files whose content is not

    def _change(self, what: str, path: Path, kind: str = "write") -> bool:
        """Whether it is a file of the run, which the service changes, and may be lost still."""
        world = self._world
        if not (world.active or world.dead) or not str(path).startswith(self._root):
            return False
        world.moment(kind, f"{what} {path.relative_to(self._root)}" if world.plan.get(world.moments + 1) else what)
        return world.moments <= world.last

    def rename(self, path: Path, target: Path) -> Path:
        if not self._change("rename", path):
            return REAL["rename"](path, target)  # type: ignore[no-any-return]
        there = _kept(target)
        found: Path = REAL["rename"](path, target)
        moved, before = str(path), str(target)
        if self._names:
            prefix = moved + "/"
            self._names = [
                (before + folder[len(moved) :] if folder == moved or folder.startswith(prefix) else folder, undo)
                for folder, undo in self._names
            ]

        def undo() -> None:
            if os.path.lexists(target):
                REAL["rename"](target, path)
            there()

        self._names.append((_folder(target), undo))
        return found

    def write_text(self, path: Path, *args: Any, **kwargs: Any) -> int:
        if not self._change("write", path):
            return REAL["write_text"](path, *args, **kwargs)  # type: ignore[no-any-return]
        new = not os.path.lexists(path)
        count: int = REAL["write_text"](path, *args, **kwargs)
        self._contents.add(os.stat(path).st_ino)
        if new:
            self._names.append((_folder(path), lambda: REAL["unlink"](path, missing_ok=True)))
        return count

    def touch(self, path: Path, *args: Any, **kwargs: Any) -> None:
        if self._change("touch", path):
            self._world.tell(f"touch {path}")
        REAL["touch"](path, *args, **kwargs)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        if os.path.lexists(path):
            self._change("unlink", path, "delete")
        REAL["unlink"](path, missing_ok=missing_ok)

    def symlink_to(self, path: Path, target: Any, target_is_directory: bool = False) -> None:
        if self._change("link", path):
            self._names.append((_folder(path), lambda: REAL["unlink"](path, missing_ok=True)))
        REAL["symlink_to"](path, target)

    def mkdir(self, path: Path, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("exist_ok") and os.path.isdir(path):
            return
        if self._change("mkdir", path):
            missing = list(takewhile(lambda new: not new.exists(), chain([path], path.parents)))
            for new in reversed(missing):
                self._names.append((_folder(new), lambda new=new: REMOVE(new, ignore_errors=True)))  # type: ignore[misc]
        REAL["mkdir"](path, *args, **kwargs)

    def rmtree(self, path: Any, ignore_errors: bool = False, **kwargs: Any) -> None:
        if os.path.lexists(path):
            self._change("remove", Path(path), "delete")
            REMOVE(path, ignore_errors=ignore_errors, **kwargs)
        elif not ignore_errors:
            REMOVE(path, **kwargs)

    def sync(self, path: Path) -> None:
        """As `folders.sync`."""
        if self._world.dead:
            self._world.moment("write", "sync")
        if self._world.moments > self._world.last:
            return
        name, found = str(path), os.stat(path)
        if not stat.S_ISDIR(found.st_mode):
            self._contents.discard(found.st_ino)
        elif self._names:
            self._names = [entry for entry in self._names if entry[0] != name]

    def forget(self) -> None:
        """The process ended, and the machine did not: all that was written will be."""
        self._names.clear()
        self._contents.clear()

    def lose(self, rng: random.Random) -> None:
        """The power fails: names from a random one on are lost, and contents that were not synced are cut short or not."""
        kept = rng.randint(0, len(self._names))
        lost = self._names[kept:]
        for _, undo in reversed(lost):
            undo()
        cut = 0
        if self._contents:
            for folder, _, files in os.walk(self._root):
                for name in sorted(files):
                    file = os.path.join(folder, name)
                    there = os.lstat(file)
                    if there.st_ino in self._contents and rng.random() < 0.7:
                        os.truncate(file, rng.randint(0, max(there.st_size - 1, 0)))
                        cut += 1
        self._world.tell(f"the power fails: {len(lost)} names are lost, {cut} files cut short")
        self.forget()

    @property
    def usage(self) -> shutil._ntuple_diskusage:
        """As `shutil.disk_usage`."""
        free = 0 if self._world.full else 1 << 40
        return shutil._ntuple_diskusage(1 << 41, (1 << 41) - free, free)


def _folder(path: Path) -> str:
    return str(path).rpartition("/")[0]


def _kept(target: Path) -> Undo:
    """Puts back what a rename is about to replace."""
    if not os.path.lexists(target):
        return lambda: None
    if target.is_symlink():
        link = os.readlink(target)
        return lambda: REAL["symlink_to"](target, link)
    if target.is_file():
        text = target.read_bytes()
        return lambda: target.write_bytes(text)
    return lambda: None
