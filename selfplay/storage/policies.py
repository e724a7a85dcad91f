"""The policies of a run: plain Hugging Face checkpoints, whole only with their manifest, and `current`.

<run>/policies/0003/        model files + manifest.json; numbers are never reused
<run>/policies/0000/        manifest.json alone: the initial policy stays where it is. Where its folder holds more than a
                            checkpoint, links to its files; where it is an adapter, that merged with its base
<run>/current               the number of the policy that serves, as text: every file system can replace a file in one step
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.storage import checkpoints, fences, folders, hashes, seals
from selfplay.storage.checkpoints import MASTERS
from selfplay.types import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    version: int
    parent: int | None
    round: int
    beta: float | None
    reference: int | None
    reference_sha256: str | None
    fingerprint: str  # of the configuration that made it
    packages: dict[str, str]
    update: dict[str, float]  # share_changed, relative_norm
    files: dict[str, str]  # name → SHA-256
    canaries: dict[str, Any]  # token_ids (C, T), logps (C,): summed nats under these weights in the serving dtype
    source: str | None = None  # policy 0: the folder it refers to, where that is not its own


FIELDS = tuple(field.name for field in dataclasses.fields(Manifest))


def verify(path: Path, masters: bool = True) -> Manifest:
    """Read the manifest of the policy folder `path` and check every file against it.

    Without `masters` only what an engine reads is checked: the float32 copy for the trainer is twice as large as that.
    Raises CheckpointError for a missing manifest, a missing file, or a file that differs.
    """
    manifest = read(path)
    root = Path(manifest.source) if manifest.source else path
    files = {n: h for n, h in manifest.files.items() if masters or not n.startswith(f"{MASTERS}/")}
    hashes.verify_files(root, files, CheckpointError)
    return manifest


def read(path: Path) -> Manifest:
    """Read the manifest of a policy folder without hashing its files."""
    try:
        return Manifest(**seals.read_json(path / folders.MANIFEST, FIELDS))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no manifest: it is not a whole policy") from None
    except TypeError as error:
        raise CheckpointError(f"{path / folders.MANIFEST} cannot be read: {error}") from None


def write(path: Path, manifest: Manifest) -> None:
    """Write the manifest of a policy folder: it is whole with it."""
    seals.write_json(path / folders.MANIFEST, {name: getattr(manifest, name) for name in FIELDS})


def weights_sha256(manifest: Manifest) -> str:
    """One SHA-256 over the weights files named in a manifest."""
    return hashes.of_weights(manifest.files)


class Policies:
    """The folder `<run>/policies` and the file `<run>/current`."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "policies"
        self._current = run_dir / "current"

    def folder(self, version: int) -> Path:
        return self.root / f"{version:04d}"

    def versions(self) -> list[int]:
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit())

    def get(self, version: int) -> Policy:
        """The policy with this number; raises CheckpointError when its weights are gone."""
        manifest = read(self.folder(version))
        path = self._path(version, manifest)
        if not all((path / name).is_file() for name in manifest.files):
            raise CheckpointError(
                f"the weights of policy {version} are gone", "pin policies that you need (retention.pinned)"
            )
        return self._described(version, manifest)

    def verified(self, version: int) -> tuple[Policy, Manifest]:
        """The policy with this number, whose files are checked (`verify`), and its manifest."""
        manifest = verify(self.folder(version))
        return self._described(version, manifest), manifest

    def tokenizing(self, version: int) -> Policy:
        """The policy with this number for its tokenizer, templates and generation settings: all its files but the weights are
        checked, for they are copied into the policies that are made after it. Raises CheckpointError."""
        manifest = read(self.folder(version))
        beside = {name: sha256 for name, sha256 in manifest.files.items() if not name.endswith(".safetensors")}
        hashes.verify_files(self._path(version, manifest), beside, CheckpointError)
        return self._described(version, manifest)

    def _path(self, version: int, manifest: Manifest) -> Path:
        return Path(manifest.source) if manifest.source else self.folder(version)

    def _described(self, version: int, manifest: Manifest) -> Policy:
        return Policy(
            version=version,
            path=str(self._path(version, manifest)),
            parent=manifest.parent,
            round=manifest.round,
            beta=manifest.beta,
            reference=manifest.reference,
        )

    def whole(self, version: int) -> bool:
        """Whether all files of a policy are there."""
        try:
            self.get(version)
        except CheckpointError:
            return False
        return True

    @property
    def current(self) -> int | None:
        """Number of the policy that `current` names; None where it names none, or is no file.

        A run of an earlier version has a symbolic link to the policy's folder, which is read too.
        """
        try:
            link = self._current.is_symlink()
            text = os.readlink(self._current) if link else self._current.read_text(encoding="utf-8")
            return int(Path(text.strip()).name)
        except (OSError, ValueError):
            return None

    def set_current(self, version: int) -> None:
        """Write down which policy serves, in one atomic step."""
        assert (self.folder(version) / folders.MANIFEST).is_file(), f"policy {version} is not there"
        with folders.disk_errors(self._current):
            if self._current.is_dir() and not self._current.is_symlink():  # a copy has made a folder of an earlier link
                self._current.rename(self._current.with_name("current.copied"))
            with folders.whole(self._current) as partial:
                # An earlier version made a link of this name, which would be written through.
                partial.unlink(missing_ok=True)
                partial.write_text(f"{version}\n", encoding="utf-8")

    def clean(self) -> None:
        """Delete what a writer of `current` has left that was ended before it was done."""
        with folders.disk_errors(self._current):
            self._current.with_name(f".{self._current.name}.partial").unlink(missing_ok=True)

    def import_initial(
        self,
        source: Path,
        canaries: dict[str, Any],
        fingerprint: str,
        packages: dict[str, str],
        made: Path | None = None,
    ) -> None:
        """Record the initial policy as version 0. Its files stay where they are.

        made: where a folder was made of `source` for the run, of links or of a merged adapter. If it is there, it is moved to
        its number.
        """
        made = made if made is not None and made.is_dir() else None
        manifest = Manifest(
            version=0,
            parent=None,
            round=0,
            beta=None,
            reference=None,
            reference_sha256=None,
            fingerprint=fingerprint,
            packages=packages,
            update={},
            files=checkpoints.hashed(made or source),
            canaries=canaries,
            source=None if made else str(source.resolve()),
        )
        if made is not None:
            folders.make(self.root)
            write(made, manifest)
            self.adopt(0, made)
            return
        with folders.folder(self.folder(0)) as partial:
            write(partial, manifest)

    def adopt(self, version: int, exported: Path) -> None:
        """Move an exported policy (with its manifest) to its number. Does nothing when that was done before."""
        if self.folder(version).is_dir():
            return
        verify(exported)
        fences.check(self.root)
        exported.rename(self.folder(version))
        folders.sync(self.root)
        folders.sync(exported.parent)
