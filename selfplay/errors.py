"""Errors a user can act on: one class per boundary, each with what to do about it and the exit code of `round.py`."""

from __future__ import annotations

from pathlib import Path


class SelfplayError(RuntimeError):
    """What went wrong, and in `hint` what to do about it."""

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(SelfplayError, ValueError):
    """The configuration cannot be used as it is."""

    exit_code = 2


class InputError(SelfplayError, ValueError):
    """A model, a prompt file or a run folder that the configuration names cannot be used."""

    exit_code = 2


class InUseError(InputError):
    """Another process works in the run folder, or may work in it."""


class CheckpointError(SelfplayError):
    """A policy's files are not what its manifest says, or do not fit the running model."""


class DamagedError(CheckpointError):
    """A file of a run folder is not what was written there, and cannot be made again by itself."""

    def __init__(self, path: Path, what: str, hint: str = "") -> None:
        super().__init__(
            f"{path} is damaged: {what}",
            hint
            or "put it back from a copy; `selfplay doctor` says what else is damaged, and mends what can be mended",
        )
        self.path, self.what = path, what


class Interrupted(Exception):
    """A round stops here because somebody wants it to; nothing is wrong, and the same call goes on with it.

    `now`: not even the step that runs is to be finished, because the round will be given up.
    """

    def __init__(self, why: str, now: bool = False) -> None:
        super().__init__(why)
        self.now = now


class EngineError(SelfplayError):
    """The generator could not do what it was asked, restarts included."""


class SwapError(SelfplayError):
    """New weights could not be shown to be in the engine."""


class TrainError(SelfplayError):
    """Training stopped; `kind` says why: oom, nonfinite, agreement, no_update, input, internal or died."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind = kind


class RewardError(SelfplayError):
    """Rewards are missing: an outage, or too many items without a score. They are never guessed."""


class PublishError(SelfplayError):
    """A policy could not be published; the run goes on."""


class GuardError(SelfplayError):
    """The reward is not what it was, or looks wrong; nothing was trained on it."""


class DiskError(SelfplayError):
    """Too little disk space for the next stage, or the disk filled up while it wrote."""


class LockLost(SelfplayError):
    """This process has the run folder no longer: it was taken over, moved, or its lock was replaced. It writes nothing more."""


class StageFailed(SelfplayError):
    """A stage of a round failed; what was finished before it is kept."""

    def __init__(self, stage: str, round_index: int, cause: BaseException, log: Path | None) -> None:
        hint = getattr(cause, "hint", "") or "run the same command again: finished stages are kept"
        super().__init__(f"round {round_index}: stage {stage} failed: {cause}", hint)
        self.stage, self.log = stage, log
        self.exit_code = getattr(cause, "exit_code", 3)
