"""The section `run`: the name, the folder and the seed of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from selfplay.config.base import Section


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its folder is `<dir>/<name>`."""
    dir: Path = Path("runs")
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice of the run derives from this number."""
    locks: Literal["flock", "lease"] = "flock"
    """How one process keeps others out of the run folder: a lock of the file system, or, where there is none (some NFS and
    Lustre, SMB, object stores), a claim that it renews all the time (docs/operations.md, File systems)."""
    lease_seconds: Annotated[float, Field(ge=3, le=3600)] = 60.0
    """With `locks: lease`: seconds that a claim has to stand still before another process may take the folder over. A process
    that cannot renew its claim for three quarters of it stops. More where the file system stops answering for long."""
