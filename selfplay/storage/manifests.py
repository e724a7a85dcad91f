"""The manifests of finished stages, and the files of earlier rounds that a later one reads by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError, DamagedError, InputError
from selfplay.storage import folders, hashes, seals

MADE = ("rounds/*/*/manifest.json", "pool/initial.json")
"""Files that a run folder has only after its ledger."""
FIELDS = ("stage", "round", "fingerprint", "seconds", "metrics", "files")


def read(path: Path) -> dict[str, Any]:
    """What a finished stage said of itself: `files`, `seconds`, `metrics`. Raises CheckpointError where it cannot be read."""
    try:
        found = seals.read_json(path, FIELDS)
        return {name: found[name] for name in ("files", "seconds", "metrics")}
    except (OSError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r})") from error


def require_whole(path: Path) -> Path:
    """A file of an earlier round, shown to be what its stage wrote. Raises DamagedError.

    Its hash is remembered for as long as the process lives; a page of a table that is damaged later has a checksum of its own.
    """
    stage = path.parent
    while not (stage / folders.MANIFEST).is_file() and len(stage.parts) > len(path.parts) - 3:
        stage = stage.parent  # a file of a suite lies a folder deeper
    name = path.relative_to(stage).as_posix()
    try:
        files = read(stage / folders.MANIFEST)["files"]
        hashes.verify_files(stage, {name: files[name]}, CheckpointError)
    except (CheckpointError, KeyError) as error:
        raise DamagedError(
            path,
            f"it is not what {stage / folders.MANIFEST} says",
            "put it back from a copy; `selfplay doctor` sets it aside where there is none, and later rounds go on without it",
        ) from error
    return path


def require_nothing_made(run_dir: Path, what: str) -> None:
    """Raise InputError where a run folder has a ledger no more, but pool or finished stages.

    A new one would know nothing of pins, orders and which policy serves. Where only ledger.sqlite was copied, all that the
    ledger said may have been in ledger.sqlite-wal.
    """
    made = next((path for name in MADE for path in run_dir.glob(name)), None)
    if made is not None:
        raise InputError(
            f"{run_dir / 'ledger.sqlite'} {what}, and {made} is there: no new ledger is made beside what a run has done",
            "put ledger.sqlite, with ledger.sqlite-wal where there is one, back from a copy; without a copy, `selfplay doctor` "
            "makes one from the manifests of the folder",
        )
