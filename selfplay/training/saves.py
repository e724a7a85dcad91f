"""The trainer's saves on disk: which of them are whole, and what lies beside them.

A save is whole with its state file, which is written last and has the hashes of all its other files: weights, optimizer,
schedule, random numbers. One that is damaged only costs time. Training goes on from the save before it, or from the start.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError, DamagedError
from selfplay.storage import folders, hashes, seals
from selfplay.training.jobs import TrainJob

BESIDE = {"job.json": (*TrainJob.model_fields, "world"), "agreement.json": ("mean", "p99", "tokens")}
"""Files beside the saves, and the keys that they may have."""
STATE = "epsilon_dpo.json"
"""β of a save, and the hashes of its other files."""


def finish(folder: Path, found: Mapping[str, Any]) -> None:
    """Make a save whole: sync it, and write its state, with the hashes of its other files."""
    folders.sync_tree(folder)
    seals.write_json(folder / STATE, {**found, "files": hashes.hash_files(folder, ignore=(STATE,))})
    folders.sync(folder.parent)


def state(folder: Path) -> dict[str, Any]:
    """The state of a save. Raises DamagedError where it cannot be read, FileNotFoundError where there is none."""
    return seals.read_json(folder / STATE, ("beta", "epsilon", "step", "logratios"))


def require_whole(folder: Path) -> None:
    """Read and hash all files of a save. Raises CheckpointError where one is not what was written."""
    hashes.verify_files(folder, state(folder).get("files", {}), CheckpointError, anew=True)


def keep_whole(work: Path, same: bool) -> None:
    """Delete saves until the newest is whole; where they are not of the same job, all of them.

    One that was cut off has no state file, and is deleted without a word; one that is damaged is told (`seals.repairs`).
    """
    newest_first = sorted(work.glob("checkpoint-*"), key=lambda folder: -int(folder.name.split("-")[1]))
    for folder in newest_first:
        if same and (folder / STATE).is_file():
            try:
                require_whole(folder)
                return
            except CheckpointError as error:
                seals.note_repair(
                    f"a save of the trainer is dropped, which goes on from the one before it or anew: {error}"
                )
        shutil.rmtree(folder)


def remembered(path: Path) -> dict[str, Any] | None:
    """What lies beside the saves in a sealed file; None where it is gone or damaged, since it only saves time."""
    try:
        return seals.read_json(path, BESIDE[path.name])
    except FileNotFoundError:
        return None
    except DamagedError as error:
        path.unlink()
        seals.note_repair(f"{error}; it is made again")
        return None
