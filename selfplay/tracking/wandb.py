"""Weights & Biases, online or offline, with a copy of what it gets in `<run>/wandb`."""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path

from selfplay.config import Config
from selfplay.errors import ConfigError
from selfplay.tracking.wandb_like import WandbLike

PACKAGE = "wandb"
KEY = "WANDB_API_KEY"  # environment variable with the key
SECRETS = (KEY,)
SECONDS = 30.0  # how long its server is waited for at the beginning and at the end of a run


def require() -> None:
    """Raise ConfigError where W&B is to be online and has no key: it would ask for one in the middle of a round."""
    wandb = importlib.import_module("wandb")
    hint = f"set the environment variable {KEY}, or WANDB_MODE=offline (`wandb sync` uploads what that keeps)"
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    try:
        if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise ConfigError("track: wandb has no API key", hint)
    except wandb.Error as error:
        raise ConfigError(f"track: wandb: {error}", hint) from None


def open_run(config: Config, run_dir: Path, run_id: str) -> Wandb:
    return Wandb(config, run_dir, run_id)


class Wandb(WandbLike):
    """A run of W&B, which has a process of its own."""

    def __init__(self, config: Config, run_dir: Path, run_id: str) -> None:
        wandb = importlib.import_module("wandb")
        # A server that cannot be reached costs a round seconds, not minutes, and never keeps the service from ending.
        settings = wandb.Settings(console="off", init_timeout=SECONDS, finish_timeout=SECONDS)
        try:
            # W&B goes on with the run of this id.
            super().__init__(
                wandb,
                config,
                name=config.run.name,
                id=f"{config.run.name}-{run_id}",
                dir=str(run_dir),
                settings=settings,
            )
        except Exception:
            self._end_process()
            raise
        for axis in ("round", "train"):
            wandb.define_metric(f"{axis}/*", step_metric=f"{axis}/step")

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._end_process()

    def _end_process(self) -> None:
        """End the process, so that the next run starts another.

        It takes a run that it could not open for open, and W&B does not start it again where it was killed.
        """
        with contextlib.suppress(Exception):
            self._module.teardown()
