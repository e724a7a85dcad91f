"""Round and trainer metrics in TensorBoard, Weights & Biases or trackio: the setting `track` names one of `kinds.TRACKERS`.

Rounds are steps of `round/…`. Optimizer steps are counted on over the rounds, and are steps of `train/…`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from selfplay import kinds
from selfplay.config import Config
from selfplay.errors import ConfigError
from selfplay.visible import line


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        """Take values whose names are `stage/name`; `axis` is «round» or «train»."""

    def close(self) -> None:
        """Hand over what is still waiting, and end."""


class Kind(Protocol):
    """What a module in `kinds.TRACKERS` holds. It imports the package of the tracker only in its functions."""

    PACKAGE: str
    """The Python package that it needs."""
    SECRETS: tuple[str, ...]
    """Environment variables with keys. They are withheld from the child processes, which need none of them."""

    @staticmethod
    def require() -> None:
        """Look for what is needed beside the package, before anything starts. Raises ConfigError."""

    @staticmethod
    def open_run(config: Config, run_dir: Path, run_id: str) -> Tracker:
        """Open the run. `run_id` tells runs of one name apart, and stays with the run folder."""


def _kind(name: str) -> Kind:
    return cast(Kind, kinds.resolve(kinds.TRACKERS, name))


def secrets() -> list[str]:
    """The environment variables that hold keys of any tracker."""
    return [secret for name in kinds.TRACKERS for secret in _kind(name).SECRETS]


def require(name: str) -> None:
    """Raise ConfigError where the tracker `name` cannot work: its package is not installed, or it has no key."""
    if name == "none":
        return
    kind = _kind(name)
    if importlib.util.find_spec(kind.PACKAGE) is None:
        hint = f"install it (pip install {kind.PACKAGE}), or set track to tensorboard or none"
        raise ConfigError(f"track: {kind.PACKAGE} is not installed", hint)
    kind.require()


def open_tracker(config: Config, run_dir: Path, run_id: str) -> Tracker | None:
    """The tracker that `track` names; None for «none». Raises ConfigError, and whatever its package raises."""
    if config.track == "none":
        return None
    require(config.track)
    return _kind(config.track).open_run(config, run_dir, run_id)


def log_round(
    tracker: Tracker, index: int, metrics: Mapping[str, float], history: list[dict[str, float | None]], first_step: int
) -> None:
    """Hand over one finished round: its metrics, and each optimizer step of it, numbered from `first_step` on."""
    tracker.log("round", {line(k): v for k, v in metrics.items() if math.isfinite(v)}, index)
    for offset, row in enumerate(history):
        values = {line(k.removeprefix("train/")): v for k, v in row.items() if k != "step" and v is not None}
        tracker.log("train", values, first_step + offset)
