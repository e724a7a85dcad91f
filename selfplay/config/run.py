"""The section `run`: the name, the folder and the seed of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from selfplay.config.base import Section


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: Path = Path("runs")
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run derives from this number."""
