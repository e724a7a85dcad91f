"""The frame of every stage of a round: done once, whole or not at all, verified, recorded, and mended with what it made.

A stage works in a folder beside its target, which is synced and renamed when it is done. A stage that has its folder is
never run again; one that has not leaves no trace. What a stage declares of itself (`selfplay.stage`) is all that the frame
knows of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import seeds
from selfplay.config import Config
from selfplay.errors import CheckpointError, SelfplayError, StageFailed
from selfplay.progress import Display, Line
from selfplay.stage import Metrics, Stage, made_from
from selfplay.storage import folders, hashes, manifests, seals
from selfplay.storage.agreement import REPAIRED
from selfplay.storage.ledger import LedgerError, Store
from selfplay.storage.outside import explained

GIVE_UP = "put the folder back from a copy, or give the round up (selfplay cancel): its policy was made from it"

Work = Callable[[Path, Line], Metrics]  # writes to the folder, tells its progress, returns metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The folder of one round, and the stages in it."""

    dir: Path
    index: int
    stages: Sequence[Stage]
    """All stages of a round, in their order."""
    config: Config
    store: Store
    display: Display
    breathe: Callable[[str], None]
    """Called before a stage («stage»); may raise Interrupted."""
    logs: Path
    weights: Callable[[], int]
    """Size of the initial policy (bytes)."""
    adopted: Callable[[], bool]
    """Whether the policy that this round trained has its place among the run's."""

    def done(self, stage: Stage) -> bool:
        return (self.dir / stage.name).is_dir()

    def path(self, name: str) -> Path:
        """An artifact of the round, «stage/file»."""
        return self.dir / name

    def seed(self, *parts: object) -> int:
        """The seed of one of the round's random choices."""
        return seeds.derive(self.config.run.seed, self.index, *parts)

    def shards(self, name: str, *key: object) -> Path:
        """Where a stage keeps finished shards. Another key, such as other settings, gets another folder."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        return self.dir / f"{name}-{digest[:12]}.shards"

    def do(self, stage: Stage, work: Work, total: int | None = None) -> None:
        """Run a stage unless it is done, and record it. `total`: how much of its unit there is to do, where that is known."""
        target = self.dir / stage.name
        if target.is_dir():
            manifest = self.manifest(stage)
            try:
                hashes.verify_files(target, manifest["files"], CheckpointError)
            except CheckpointError as error:
                raise CheckpointError(str(error), error.hint or self._mend(stage)) from error
            self.display.kept(self.index, stage.name)
        else:
            self.breathe("stage")
            with self.display.stage(self.index, stage.name, total, stage.unit) as line:
                manifest = self._run(stage, target, work, line)
        self.store.record_stage(self.index, stage.name, manifest["seconds"], manifest["metrics"])

    def record_finished(self) -> None:
        """Record the stages that are done, for a round that is given up: a kill may have come before the record of the last."""
        for stage in self.stages:
            if self.done(stage):
                with contextlib.suppress(CheckpointError):  # damaged, which may be why the round is given up
                    manifest = self.manifest(stage)
                    self.store.record_stage(self.index, stage.name, manifest["seconds"], manifest["metrics"])

    def metrics(self, stage: Stage) -> Metrics:
        """The metrics of a finished stage."""
        found: Metrics = self.manifest(stage)["metrics"]
        return found

    def manifest(self, stage: Stage) -> dict[str, Any]:
        """What a finished stage said of itself. Raises CheckpointError where that is gone or damaged."""
        path = self.dir / stage.name / folders.MANIFEST
        try:
            return manifests.read(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}: this stage cannot be shown to be whole", self._mend(stage)) from error

    def _mend(self, stage: Stage) -> str:
        """What to do about a damaged stage: those that were made from it go with it."""
        after = [name for name in made_from(self.stages, stage.name) if (self.dir / name).is_dir()]
        if self.adopted() and "train" in after:
            return GIVE_UP
        return f"delete {', '.join(after)} in {self.dir} to have that done again"

    def _run(self, stage: Stage, target: Path, work: Work, line: Line) -> dict[str, Any]:
        """Returns what the stage says of itself in its manifest."""
        started = time.monotonic()
        try:
            folders.require_free(self.dir.parent.parent, stage.space(self.config, self.weights()))
            if missing := [name for name in stage.reads if not self.path(name).is_file()]:
                raise CheckpointError(f"{self.path(missing[0])} is missing: {stage.name} is made from it", GIVE_UP)
            with folders.folder(target) as folder, folders.disk_errors(target):
                metrics = work(folder, line)
                absent = [name for name in stage.writes if not (folder / name).is_file()]
                assert not absent, f"{stage.name} has not written {absent}"
                # A policy in the folder has a manifest of its own, and leaves it for policies/.
                files = {n: h for n, h in hashes.hash_files(folder).items() if not n.startswith("policy/")}
                manifest = {
                    "stage": stage.name,
                    "round": self.index,
                    "fingerprint": self.config.fingerprint(),
                    "seconds": time.monotonic() - started,
                    "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
                    "files": files,
                }
                seals.write_json(folder / folders.MANIFEST, manifest)
        except Exception as error:
            known = error if isinstance(error, SelfplayError) else explained(error)
            if known is None:
                raise
            self._tell_repairs()
            log = getattr(known, "log", None) or self._log(stage)
            with contextlib.suppress(LedgerError):  # on a full disk the ledger cannot take the event either
                self.store.event("failed", f"{stage.name}: {known}", self.index)
            raise StageFailed(stage.name, self.index, known, log) from error
        self._tell_repairs()
        return manifest

    def _tell_repairs(self) -> None:
        """Record what a stage has found damaged and makes again."""
        with contextlib.suppress(LedgerError):
            for text in seals.repairs():
                self.store.event(REPAIRED, text, self.index)

    def _log(self, stage: Stage) -> Path | None:
        path = self.logs / f"{stage.log}.log"
        return path if path.is_file() else None
