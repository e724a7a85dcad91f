"""The run's policies as the engines take them: every file that is served is whole, and all of them have one shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.generation.swap import Canaries, check_fits
from selfplay.storage import checkpoints, policies
from selfplay.storage.policies import Manifest
from selfplay.storage.tensors import TensorSpec
from selfplay.types import Policy


class Checkpoints:
    """The policies of one run. Several threads may ask."""

    def __init__(self, run_dir: Path) -> None:
        self._policies = policies.Policies(run_dir)
        self._shape: tuple[dict[str, TensorSpec], dict[str, Any]] | None = None

    def manifest(self, policy: Policy) -> Manifest:
        """The run's manifest of a policy, every file of it that an engine reads checked; raises CheckpointError.

        The manifest that a source folder has of its own, as a policy of another run, has no say.
        """
        folder = self._policies.folder(policy.version)
        manifest = policies.verify(folder, masters=False)
        assert Path(manifest.source or folder).resolve() == Path(policy.path).resolve(), "policies come from the run"
        Canaries.of(manifest.canaries)
        return manifest

    def config(self, policy: Policy) -> dict[str, Any]:
        """The policy's config.json; raises CheckpointError."""
        try:
            found: dict[str, Any] = json.loads((Path(policy.path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{policy.path}/config.json cannot be read: {error}") from None
        return found

    def loaded(self, policy: Policy) -> None:
        """Remember the tensors and the settings of a policy that an engine has loaded: they are those of the run's model."""
        self._shape = checkpoints.tensors(Path(policy.path)), self.config(policy)

    def fitting(self, policy: Policy) -> Manifest:
        """The manifest of a policy that also fits the running model; raises CheckpointError."""
        manifest = self.manifest(policy)
        assert self._shape is not None, "a policy was loaded before"
        tensors, config = self._shape
        check_fits(tensors, checkpoints.tensors(Path(policy.path)), config, self.config(policy))
        return manifest
