"""The policies of a run: plain Hugging Face checkpoints, whole only with their manifest, and `current`.

<run>/policies/0003/        model files + manifest.json; numbers are never reused
<run>/policies/0000/        manifest.json alone: the initial policy stays where it is
<run>/current               symlink to the policy that serves
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.storage import folders, hashes
from selfplay.types import Policy

TensorSpec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape
MASTERS = "masters"  # folder in a checkpoint with the same in float32, from which training starts
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")  # what a checkpoint is made of


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
    source: str | None = None  # policy 0: the folder it refers to


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
        return Manifest(**folders.read_json(path / folders.MANIFEST))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no manifest: it is not a whole policy") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path / folders.MANIFEST} cannot be read: {error}") from None


def tensors(path: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of all tensors of a checkpoint, from its safetensors headers alone."""
    specs: dict[str, TensorSpec] = {}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no safetensors file", "convert the model: pickled weights are never loaded")
    for file in files:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > file.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(stream.read(length))
            end = 8 + length + max((s["data_offsets"][1] for n, s in header.items() if n != "__metadata__"), default=0)
            if end != file.stat().st_size:
                raise ValueError(f"it has {file.stat().st_size} bytes, its header says {end}")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from None
        specs |= {n: (s["dtype"], tuple(s["shape"])) for n, s in header.items() if n != "__metadata__"}
    return specs


def checkpoint_files(path: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that others made.

    A policy of another run is one too: its masters count, its manifest there does not.
    """
    found = sorted([*path.iterdir(), *(path / MASTERS).glob("*")])
    return {
        p.relative_to(path).as_posix(): hashes.sha256(p)
        for p in found
        if p.is_file() and p.suffix in SUFFIXES and p.name != folders.MANIFEST
    }


def weights_sha256(manifest: Manifest) -> str:
    """One SHA-256 over the weights files named in a manifest."""
    return hashes.of_weights(manifest.files)


class Policies:
    """The folder `<run>/policies` and the symlink `<run>/current`."""

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
        path = Path(manifest.source) if manifest.source else self.folder(version)
        if not all((path / name).is_file() for name in manifest.files):
            raise CheckpointError(
                f"the weights of policy {version} are gone", "pin policies that you need (retention.pinned)"
            )
        return Policy(
            version=version,
            path=str(path),
            parent=manifest.parent,
            round=manifest.round,
            beta=manifest.beta,
            reference=manifest.reference,
        )

    @property
    def current(self) -> int | None:
        """Number of the policy that serves; None before the first import."""
        try:
            return int(Path(os.readlink(self._current)).name)
        except FileNotFoundError:
            return None

    def set_current(self, version: int) -> None:
        """Point `current` at a policy, in one atomic step."""
        assert (self.folder(version) / folders.MANIFEST).is_file(), f"policy {version} is not there"
        beside = self._current.with_name(".current.partial")
        beside.unlink(missing_ok=True)
        beside.symlink_to(Path("policies") / f"{version:04d}")
        beside.rename(self._current)
        folders.sync(self._current.parent)

    def import_initial(
        self, source: Path, canaries: dict[str, Any], fingerprint: str, packages: dict[str, str]
    ) -> None:
        """Record the initial policy as version 0; its files stay where they are."""
        target = self.folder(0)
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
            files=checkpoint_files(source),
            canaries=canaries,
            source=str(source.resolve()),
        )
        with folders.folder(target) as partial:
            folders.write_json(partial / folders.MANIFEST, dataclasses.asdict(manifest))

    def adopt(self, version: int, exported: Path) -> None:
        """Move an exported policy (with its manifest) to its number. Does nothing when that was done before."""
        if self.folder(version).is_dir():
            return
        verify(exported)
        exported.rename(self.folder(version))
        folders.sync(self.root)
        folders.sync(exported.parent)
