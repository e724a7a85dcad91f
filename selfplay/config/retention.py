"""The section `retention`: which weights, artifacts of rounds and rows of the ledger stay on disk."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from selfplay.config.base import Positive, Section


class RetentionConfig(Section):
    last: Annotated[int, Field(ge=0)] = 3
    """The newest policies whose weights are kept, beside current, its parent, the initial one and the reference."""
    every: Annotated[int, Field(ge=0)] = 0
    """Every n-th policy is kept too. 0: none is."""
    pinned: list[int] = []
    """Policies that are always kept."""
    rejected_rounds: Annotated[int, Field(ge=0)] = 2
    """Rounds after which the weights of a rejected policy go."""
    candidates_rounds: Positive | None = None
    """The newest rounds that keep their candidates and scores, never fewer than `guard.history` and `pairs.history`. Older
    rounds keep their prompts, pairs, verdicts and manifests. None: all rounds keep everything."""
    pair_rows_rounds: Positive | None = None
    """The newest rounds whose pairs the page and the API can list and filter, never fewer than `guard.history` and
    `pairs.history`. The pairs of older rounds stay in their folders, and leave the ledger. None: the ledger has all."""
    event_rows: Annotated[int, Field(ge=1000)] | None = 100_000
    """The newest events that the ledger keeps. Orders that were answered before them go too. None: it keeps all."""
