"""What a reward server serves: a Scorer is anything that turns items into scores, such as a model, rules or a judge."""

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reward.schema import Health, Item


class ModelRefused(ValueError):
    """This cannot serve as a reward. The message says why, and what to do."""


class Unscorable(Exception):
    """This item has no score; the message says why."""


class Stopped(Exception):
    """The server is going down. What has no score yet gets none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One item's result: a finite `value`, or None and the `reason`."""

    value: float | None = None
    reason: str | None = None


class Scorer(Protocol):
    """What scores. Only one thread at a time calls `score`."""

    health: Health
    stopping: threading.Event
    """Once it is set, `score` raises Stopped."""
    counts: Counter[str]
    """Numbers that are worth to be seen at /metrics, by name."""

    def score(self, items: Sequence[Item]) -> list[Score]:
        """A score for each item, in order."""


class OneByOne:
    """A Scorer for rewards that depend on one item alone. A subclass has `value`."""

    def __init__(self, health: Health) -> None:
        self.health = health
        self.stopping = threading.Event()
        self.counts: Counter[str] = Counter()

    def value(self, item: Item) -> float:
        """The score of one item. Whatever it raises sets the item aside, with the message of Unscorable as the reason."""
        raise NotImplementedError(f"{type(self).__name__} has no method `value`")

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Raises Stopped once `stopping` is set."""
        return [self._score(item) for item in items]

    def _score(self, item: Item) -> Score:
        if self.stopping.is_set():
            raise Stopped
        try:
            value = float(self.value(item))
        except Unscorable as error:
            return Score(reason=str(error)[:300])
        except Exception as error:  # a bad item is data; how many there may be is for the asker to say
            return Score(reason=f"{type(error).__name__}: {error}"[:300])
        return Score(value=value) if math.isfinite(value) else Score(reason=f"the value is {value}")
