"""trackio: a local ledger in `TRACKIO_DIR`, or else in the folder `trackio` under `HF_HOME`."""

from __future__ import annotations

import importlib
from pathlib import Path

from selfplay.config import Config
from selfplay.tracking.wandb_like import WandbLike

PACKAGE = "trackio"
SECRETS = ()


def require() -> None:
    """It needs nothing beside its package."""


def open_run(config: Config, run_dir: Path, run_id: str) -> WandbLike:
    """trackio goes on with the run of this name."""
    return WandbLike(importlib.import_module("trackio"), config, name=f"{config.run.name}-{run_id}")
