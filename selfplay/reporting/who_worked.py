"""Who worked when in a round, from what the ledger has of its stages: a lane for each role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from selfplay.planning.gantt import Span, busy, length

ROLES = {
    "generate": "engine", "evolve": "engine", "evaluate": "engine", "suite": "engine", "promote": "engine", "score": "reward", "depth": "trainer",
    "train": "trainer",
}  # fmt: skip
"""The role that a stage mostly waits for; the others are work of the controller."""
LANES = ("engine", "reward", "trainer", "controller")
EARLY = "generate/overlap_seconds"
"""The metric of the seconds in which the reward scored while others were still sampled."""


def spans(stages: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> list[Span]:
    """The stages of a round as work of roles, in seconds since it began.

    `stages`: rows of the ledger with `stage`, `ended` and `seconds`. A stage that was interrupted has the seconds of its last
    attempt.
    """
    ends = [(row["stage"], datetime.fromisoformat(row["ended"]).timestamp(), float(row["seconds"])) for row in stages]
    if not ends:
        return []
    began = min(end - seconds for _, end, seconds in ends)
    found = [
        Span(lane=ROLES.get(stage, "controller"), what=stage, start=end - seconds - began, seconds=seconds)
        for stage, end, seconds in ends
    ]
    sampled = next((span for span in found if span.what == "generate"), None)
    if sampled is not None and sampled.seconds and (early := metrics.get(EARLY, 0.0)) > 0:
        share = min(1.0, early / sampled.seconds)
        found.append(Span(lane="reward", what="score", start=sampled.start, seconds=sampled.seconds, busy=share))
    return sorted(found, key=lambda span: span.start)


def lanes(found: Sequence[Span]) -> list[tuple[str, float]]:
    """The roles that had work, and the share of the round in which each worked."""
    there = {span.lane for span in found}
    return [(lane, busy(found, lane, length(found))) for lane in LANES if lane in there]
