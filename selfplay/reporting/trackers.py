"""Round and trainer metrics in TensorBoard, Weights & Biases or trackio: one setting, one place for both.

Rounds are steps of `round/…`; optimizer steps count on over the rounds and are steps of `train/…`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from selfplay.config import Config
from selfplay.errors import ConfigError

SECRET = "WANDB_API_KEY"  # environment variable with W&B's key
SECONDS = 30.0  # that W&B is waited for, at the beginning and at the end of a run


class Tracker(Protocol):
    """Where metrics go. Names are `stage/name`."""

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `<run>/tensorboard`, written without torch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=f"{axis}/{k}", simple_value=v) for k, v in values.items()]
        )
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


class WandbLike:
    """W&B, or trackio, which has the same interface. Both axes are metrics, so that they can be plotted against."""

    def __init__(self, module: Any, config: Config, run_dir: Path, run_id: str) -> None:
        self._module = module
        own = f"{config.run.name}-{run_id}"  # what «resume» goes by
        names: dict[str, Any] = {"name": own}
        if module.__name__ == "wandb":
            # A server that cannot be reached costs a round seconds, not minutes, and never keeps the service from ending.
            settings = module.Settings(console="off", init_timeout=SECONDS, finish_timeout=SECONDS)
            names = {"name": config.run.name, "id": own, "dir": str(run_dir), "settings": settings}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trackio prints
                module.init(project="selfplay", resume="allow", config=config.model_dump(mode="json"), **names)
        except Exception:
            self._end_process()
            raise
        if module.__name__ == "wandb":
            for axis in ("round", "train"):
                module.define_metric(f"{axis}/*", step_metric=f"{axis}/step")

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        self._module.log({f"{axis}/{name}": value for name, value in values.items()} | {f"{axis}/step": step})

    def close(self) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._module.finish()
        finally:
            self._end_process()

    def _end_process(self) -> None:
        """W&B has one, which takes a run that it could not open for open, and is not started again where it was killed."""
        if self._module.__name__ == "wandb":
            with contextlib.suppress(Exception):
                self._module.teardown()


def require(name: str) -> None:
    """Raise ConfigError where the package of a tracker is not installed, or W&B has no key and is to be online.

    W&B would ask for the key at the terminal, in the middle of a round.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        hint = f"install it (pip install {name}), or set track to tensorboard or none"
        raise ConfigError(f"track: {name} is not installed", hint)
    if name != "wandb":
        return
    wandb = importlib.import_module(name)
    hint = f"set the environment variable {SECRET}, or WANDB_MODE=offline (`wandb sync` uploads what that keeps)"
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    try:
        if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise ConfigError("track: wandb has no API key", hint)
    except wandb.Error as error:
        raise ConfigError(f"track: wandb: {error}", hint) from None


def open_tracker(config: Config, run_dir: Path, run_id: str) -> Tracker | None:
    """The tracker that `track` names; `run_id` tells runs of one name apart, and stays with the run folder."""
    if config.track == "none":
        return None
    if config.track == "tensorboard":
        return TensorBoard(run_dir / "tensorboard")
    require(config.track)
    return WandbLike(importlib.import_module(config.track), config, run_dir, run_id)


def log_round(
    tracker: Tracker, index: int, metrics: Mapping[str, float], history: list[dict[str, float | None]], first_step: int
) -> None:
    """One finished round: its metrics, and each optimizer step of it, numbered from `first_step` on."""
    tracker.log("round", {k: v for k, v in metrics.items() if math.isfinite(v)}, index)
    for offset, row in enumerate(history):
        values = {k.removeprefix("train/"): v for k, v in row.items() if k != "step" and v is not None}
        tracker.log("train", values, first_step + offset)
