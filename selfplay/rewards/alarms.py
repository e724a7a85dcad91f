"""Numbers that are above their limits: which of them a person should know of, and which of them stop a round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "cut_off": "answers that were cut off (share)",
    "length_gap": "length of chosen against rejected answers (share by which one side is shorter)",
    "decided_by_length": "pairs that length alone decides (share)",
    "duplicates": "answers that are the same as another one to their prompt (share)",
    "repetition": "n-grams that an answer repeats (share)",
    "probe_change": "change of the score of a text that did not change (standard deviations)",
    "probe_missing": "texts that did not change, but lost their score or got one (share)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    name: str
    value: float
    level: Literal["warn", "stop"]
    limit: float
    advice: str = ""
    """Which setting to change; empty where it is the reward that is to be looked at."""

    def __str__(self) -> str:
        said = f"{SIGNS[self.name]} {self.value:.3g}, limit {self.limit:g} (guard.{self.name}.{self.level})"
        return f"{said}: {self.advice}" if self.advice else said


def alarms(
    values: Mapping[str, float],
    limits: Mapping[str, Limits],
    advice: Callable[[str, float], str] = lambda name, value: "",
) -> list[Alarm]:
    """The numbers whose size is above a limit. One that is above both of its limits is a «stop» alone.

    advice: which setting to change, by the name of a sign and its value.
    """
    found = []
    for name, value in values.items():
        allowed = limits[name]
        level: Literal["warn", "stop"]
        for level, limit in (("stop", allowed.stop), ("warn", allowed.warn)):
            if limit is not None and abs(value) > limit:
                found.append(Alarm(name=name, value=value, level=level, limit=limit, advice=advice(name, value)))
                break
    return found
