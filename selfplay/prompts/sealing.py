"""Hashes of a pool: its manifest names what the importer wrote, and each file of prompts that joined later has its own beside it.

All of it is read and hashed when a run opens. Before each draw what has changed since is read and hashed again.
"""

from __future__ import annotations

from pathlib import Path

from selfplay.errors import CheckpointError, DamagedError
from selfplay.prompts.pool import ADDED, ORDERS, POLICY
from selfplay.storage import folders, hashes, seals
from selfplay.storage.folders import MANIFEST

MEND = "put the folder pool of the run back from a copy: its prompts are those that all rounds have drawn from"


def seal(folder: Path) -> None:
    """Write the manifest of a pool that is made."""
    seals.write_json(folder / MANIFEST, {"files": _files(folder)})


def require_whole(folder: Path, anew: bool = True) -> None:
    """Raise DamagedError where a file of a pool is not what was written. A pool of an earlier version gets its hashes now.

    anew: read all files, and not only those that have changed since this process hashed them.
    """
    if not (folder / MANIFEST).is_file():
        seal(folder)
    for path, what in damaged(folder, anew):
        raise DamagedError(path, what, MEND)


def damaged(folder: Path, anew: bool = True) -> list[tuple[Path, str]]:
    """The damaged files of a pool, and what is wrong with each; `anew` as in `require_whole`."""
    found: list[tuple[Path, str]] = []
    try:
        files: dict[str, str] = seals.read_json(folder / MANIFEST, ("files",))["files"]
    except (DamagedError, FileNotFoundError) as error:
        return [(folder / MANIFEST, error.what if isinstance(error, DamagedError) else "it is gone")]
    for name, expected in files.items():
        try:
            hashes.verify_files(folder, {name: expected}, CheckpointError, anew)
        except CheckpointError as error:
            found.append((folder / name, f"it {str(error).removeprefix(f'{folder / name} ')}"))
    for beside in sorted((folder / ADDED).glob(f"*{seals.BESIDE}")):
        path = beside.with_name(beside.name.removesuffix(seals.BESIDE))
        if not path.is_file():
            if path.with_name(f".{path.name}.partial").is_file():
                continue  # its writer was killed before it had its name, and nobody knows of it
            found.append((path, "it is gone"))
        elif not seals.is_sealed(path, anew):
            found.append((path, "its SHA-256 differs from the one beside it"))
    return found


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of all files by name, but of those that only save time, of those that have their own, and of the initial policy,
    which goes elsewhere."""
    skipped = {ADDED, ORDERS, POLICY}
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name.parts[0] not in skipped and name.as_posix() != folders.MANIFEST]
    return dict(zip(map(Path.as_posix, names), hashes.sha256_of(folder / name for name in names), strict=True))
