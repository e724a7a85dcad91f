"""Damages of a file: a flipped bit, whose file keeps its time of change as on a failing disk, and a file that is cut off."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

WRITTEN_IN_PLACE = (".sqlite", "-wal", "-shm", ".lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    file: str
    """Relative to the run folder."""
    how: str
    do: Callable[[Path], None]
    """Damages the file at a path."""

    @property
    def kind(self) -> str:
        """What kind of file it is: its name without the numbers and hashes in it."""
        name = re.sub(r"[0-9a-f]{12,}|\d+", "N", self.file)
        return re.sub(r"\.N\.0$", "", re.sub(r"tfevents.*", "tfevents", name))


def damages(run_dir: Path, per_kind: int, seed: int = 0) -> list[Damage]:
    """So many damages of each kind of file in a folder, four more of `current`, and the loss of the manifest of the pool."""
    rng, kinds = random.Random(seed), dict[str, list[Damage]]()
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            for each in _of_file(path.relative_to(run_dir).as_posix(), path.stat().st_size, rng):
                kinds.setdefault(each.kind, []).append(each)
    chosen = [each for of_kind in kinds.values() for each in rng.sample(of_kind, min(per_kind, len(of_kind)))]
    return [*chosen, *_of_current(), Damage(file="pool/manifest.json", how="lost", do=Path.unlink)]


def _of_file(name: str, size: int, rng: random.Random) -> Iterator[Damage]:
    for place in {rng.randrange(size), rng.randrange(size), size - 1 - rng.randrange(min(size, 64))}:
        bit = rng.randrange(8)
        yield Damage(
            file=name, how=f"bit {bit} of byte {place} flipped", do=functools.partial(flip, place=place, bit=bit)
        )
    for left in {size // 2, size - 1}:
        yield Damage(file=name, how=f"cut to {left} of {size} bytes", do=functools.partial(_cut, left=left))


def _of_current() -> Iterator[Damage]:
    """What copies and people make of the file that names the policy which serves."""

    def is_a_folder(path: Path) -> None:
        policy = next(path.parent.glob("policies/*[1-9]"), path.parent / "policies" / "0000")
        path.unlink()
        shutil.copytree(policy, path)

    def names(path: Path, text: str) -> None:
        path.unlink()
        path.write_text(text, encoding="utf-8")

    yield Damage(file="current", how="lost", do=Path.unlink)
    yield Damage(file="current", how="names nothing", do=lambda path: names(path, "x\n"))
    yield Damage(file="current", how="names policy 0", do=lambda path: names(path, "0\n"))
    yield Damage(file="current", how="is a folder", do=is_a_folder)


def flip(path: Path, place: int, bit: int) -> None:
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _cut(path: Path, left: int) -> None:
    with path.open("r+b") as file:
        file.truncate(left)


def copied(run_dir: Path, out: Path, damaged: str) -> Path:
    """A copy of a run folder. What nobody writes in place is linked; the file that will be damaged is one of its own."""

    def copy(source: str, target: str) -> None:
        own = Path(source).relative_to(run_dir).as_posix() == damaged or source.endswith(WRITTEN_IN_PLACE)
        shutil.copy2(source, target) if own else os.link(source, target)

    return shutil.copytree(run_dir, out, symlinks=True, copy_function=copy)
