"""Hashes of a pool: its manifest names what the importer wrote, and each file of prompts that joined later has its own beside it.

All of it is read and hashed when a run opens. Before each draw what has changed since is read and hashed again. The ledger
keeps the hash of the manifest, so a manifest that is gone, or that of another pool, is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from selfplay.errors import CheckpointError, DamagedError
from selfplay.prompts.pool import ADDED, ORDERS, POLICY
from selfplay.storage import folders, hashes, seals
from selfplay.storage.folders import MANIFEST

MEND = "put the folder pool of the run back from a copy: its prompts are those that all rounds have drawn from"
ANOTHER = "it is that of another pool: the ledger knows what the one of this run is"
STATE = "pool"
"""In the ledger's state: SHA-256 of the manifest of the run's pool."""


class Ledger(Protocol):
    """What is asked of the ledger (`storage.ledger.Store`)."""

    def state(self, name: str) -> Any:
        """What is kept under a name, or None."""

    def set_state(self, name: str, value: Any) -> None: ...

    def last_round(self) -> int:
        """0 before there is one."""

    def damaged_rows(self) -> list[Any]:
        """Rows that are not what was written."""


def begins(folder: Path, ledger: Ledger) -> bool:
    """Whether a run has no pool yet. Raises DamagedError where rounds have drawn from one, and it is gone."""
    if folder.is_dir():
        return False
    if ledger.last_round():
        raise DamagedError(folder, "it is gone", MEND)
    if ledger.state(STATE) is not None:
        ledger.set_state(STATE, None)  # a person has deleted it before the first round, to import another
    return True


def open_pool(folder: Path, ledger: Ledger) -> None:
    """Raise DamagedError where a file of a run's pool is not what was written, or its manifest is not the one that the ledger
    knows. Where the ledger knows none, the pool was just made, or an earlier version has made it: then it gets its hashes now.
    """
    known = ledger.state(STATE)
    if known is None and not (folder / MANIFEST).is_file():
        seal(folder)
    require_whole(folder)
    found = hashes.digest(folder / MANIFEST)
    if known is None:
        ledger.set_state(STATE, found)
    elif known != found and not ledger.damaged_rows():  # a damaged row is named when folder and ledger are compared
        raise DamagedError(folder / MANIFEST, ANOTHER, MEND)


def seal(folder: Path) -> None:
    """Write the manifest of a pool that is made."""
    seals.write_json(folder / MANIFEST, {"files": _files(folder)})


def require_whole(folder: Path, anew: bool = True) -> None:
    """Raise DamagedError where a file of a pool is not what was written.

    anew: read all files, and not only those that have changed since this process hashed them.
    """
    for path, what in damaged(folder, anew):
        raise DamagedError(path, what, MEND)


def damaged(folder: Path, anew: bool = True, known: str | None = None) -> list[tuple[Path, str]]:
    """The damaged files of a pool, and what is wrong with each; `anew` as in `require_whole`. known: what the ledger knows."""
    found: list[tuple[Path, str]] = []
    try:
        files: dict[str, str] = seals.read_json(folder / MANIFEST, ("files",))["files"]
    except (DamagedError, FileNotFoundError) as error:
        return [(folder / MANIFEST, error.what if isinstance(error, DamagedError) else "it is gone")]
    if known is not None and known != hashes.digest(folder / MANIFEST):
        found.append((folder / MANIFEST, ANOTHER))
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
