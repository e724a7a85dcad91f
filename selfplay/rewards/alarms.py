"""Numbers that are above their limits: which of them a person should know of, and which of them stop a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from selfplay.config import Limits

SIGNS = {
    "ties": "pairs of answers with equal rewards (share)",
    "saturation": "rewards at the end of their range (share)",
    "length_correlation": "correlation of reward and length",
    "shift": "shift of the rewards against the last rounds (Kolmogorov-Smirnov distance)",
    "disagreement": "disagreement within the ensemble (standard deviations)",
    "gold_drop": "fall of the gold score from its best while the reward rose",
    "probe_change": "change of the score of a text that did not change (standard deviations)",
    "probe_missing": "texts that did not change, but lost their score or got one (share)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    name: str
    value: float
    level: Literal["warn", "stop"]
    limit: float

    def __str__(self) -> str:
        return f"{SIGNS[self.name]} {self.value:.3g}, limit {self.limit:g} (guard.{self.name}.{self.level})"


def alarms(values: Mapping[str, float], limits: Mapping[str, Limits]) -> list[Alarm]:
    """The numbers whose size is above a limit. One that is above both of its limits is a «stop» alone."""
    found = []
    for name, value in values.items():
        allowed = limits[name]
        level: Literal["warn", "stop"]
        for level, limit in (("stop", allowed.stop), ("warn", allowed.warn)):
            if limit is not None and abs(value) > limit:
                found.append(Alarm(name=name, value=value, level=level, limit=limit))
                break
    return found
