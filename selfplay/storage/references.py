"""References that are no policy of the run: moving averages of its policies (`train.reference: {ema: …}`).

<run>/references/0005/       manifest.json: what the reference of round 5 was made from, and the SHA-256 of its files
<run>/references/0005/model/ a checkpoint in float32; deleted when round 5 has ended, once the next one has moved on from it
"""

from __future__ import annotations

import shutil
from pathlib import Path

from selfplay.errors import CheckpointError
from selfplay.storage import folders, hashes, seals
from selfplay.types import Reference

MODEL = "model"
FIELDS = ("round", "policy", "share", "before", "sha256", "distance", "files")


class References:
    """The folder `<run>/references`."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "references"

    def folder(self, index: int) -> Path:
        return self.root / f"{index:04d}"

    def before(self, index: int) -> int | None:
        """The newest round before `index` whose reference still has its weights."""
        found = (int(path.name) for path in self._all() if (path / MODEL).is_dir())
        return max((number for number in found if number < index), default=None)

    def get(self, index: int) -> Reference:
        """The reference of a round, its files checked. Raises CheckpointError where they are damaged or gone."""
        folder = self.folder(index)
        try:
            files: dict[str, str] = seals.read_json(folder / folders.MANIFEST, FIELDS)["files"]
        except (OSError, KeyError, CheckpointError) as error:
            raise CheckpointError(f"{folder} has no manifest that can be read: {error}", _mend(folder)) from error
        try:
            hashes.verify_files(folder / MODEL, files, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(str(error), _mend(folder)) from error
        return Reference(version=None, path=str(folder / MODEL), sha256=hashes.of_weights(files))

    def delete(self, index: int) -> None:
        """Delete the reference of a round that was given up."""
        shutil.rmtree(self.folder(index), ignore_errors=True)

    def delete_weights(self, before: int | None = None) -> None:
        """Delete the weights of all references, or of those of rounds before one. Their manifests stay."""
        for path in self._all():
            if before is None or int(path.name) < before:
                shutil.rmtree(path / MODEL, ignore_errors=True)

    def _all(self) -> list[Path]:
        return [path for path in folders.inside(self.root) if path.name.isdigit()]


def _mend(folder: Path) -> str:
    return f"delete {folder}: the reference of that round is made again from the one before"
