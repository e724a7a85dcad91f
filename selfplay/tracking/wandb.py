"""Weights & Biases, online or offline, with a copy of what it gets in `<run>/wandb`."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfplay.config import Config
from selfplay.errors import ConfigError
from selfplay.processes.children import withheld
from selfplay.tracking.wandb_like import WandbLike

PACKAGE = "wandb"
KEY = "WANDB_API_KEY"  # environment variable with the key
SECRETS = (KEY,)
SECONDS = 30.0  # how long its server is waited for at the beginning and at the end of a run


STARTING = {"wandb.sdk.lib.service.service_process": (KEY,), "wandb.sdk.lib.gitlib": ()}
"""Its modules that start programs, with the secrets that these are to get. They would hand on the whole environment."""


def _package() -> Any:
    """The package, whose programs get no secret that is not theirs.

    What its modules see as `subprocess` is replaced, and `os.environ` stays as it is: other threads read their secrets from it.
    """
    wandb = importlib.import_module("wandb")
    for name, own in STARTING.items():
        changed = {"Popen": _without_secrets(subprocess.Popen, own), "run": _without_secrets(subprocess.run, own)}
        vars(importlib.import_module(name))["subprocess"] = SimpleNamespace(**{**vars(subprocess), **changed})
    return wandb


def _without_secrets(start: Callable[..., Any], own: Sequence[str]) -> Callable[..., Any]:
    def started(argv: Sequence[str], *, env: Mapping[str, str], **settings: Any) -> Any:
        kept = env.keys() - (withheld() - set(own))
        return start(argv, env={name: env[name] for name in kept}, **settings)

    return started


def require() -> None:
    """Raise ConfigError where W&B is to be online and has no key: it would ask for one in the middle of a round."""
    wandb = _package()
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
        wandb = _package()
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
