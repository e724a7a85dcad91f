"""What a reward server serves: anything that turns items into scores. Models, rules and judges are Scorers."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reward.schema import Health, Item


class ModelRefused(ValueError):
    """This cannot serve as a reward; the message says why and what to do."""


class Stopped(Exception):
    """The server is going down; what was not scored yet is not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One item's result: a finite `value`, or None and the `reason`."""

    value: float | None = None
    reason: str | None = None


class Scorer(Protocol):
    """`score` is for one thread at a time."""

    health: Health
    stopping: threading.Event
    """Once it is set, `score` raises Stopped."""
    counts: Counter[str]
    """Whatever is worth counting, by name; shown at /metrics."""

    def score(self, items: Sequence[Item]) -> list[Score]:
        """A score for each item, in order."""
