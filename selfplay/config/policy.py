"""The sections `policy` and `swap`: the model that is aligned, and how new weights in the engine are verified."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from selfplay.config.base import Dtype, Section


class PolicyConfig(Section):
    model: str
    """Checkpoint folder or Hub id of the initial policy."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "bfloat16"
    """Serving precision: of the engine, of exported checkpoints and of the canaries."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class SwapConfig(Section):
    canaries: Annotated[int, Field(ge=1)] = 8
    """Short fixed sequences whose log-probabilities show which weights are in the engine."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest |engine − checkpoint| (nats a token); by default 1e-4 in fp32. Below, it follows from
    the noise that the engine shows when it starts, which may be 0.1 at most."""
