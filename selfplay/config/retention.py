"""The section `retention`: which policies keep their weights on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from selfplay.config.base import Section


class RetentionConfig(Section):
    last: Annotated[int, Field(ge=0)] = 3
    """The newest policies whose weights are kept, beside current, its parent, the initial one and the reference."""
    every: Annotated[int, Field(ge=0)] = 0
    """Every n-th policy is kept too; 0: none."""
    pinned: list[int] = []
    """Policies that are always kept."""
    rejected_rounds: Annotated[int, Field(ge=0)] = 2
    """Rounds after which the weights of a rejected policy go."""
