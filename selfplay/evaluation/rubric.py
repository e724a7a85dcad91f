"""Calling the rubric of `evaluate.gold`: in one way, for the evaluation and for `selfplay check`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from selfplay.types import Message

Rubric = Callable[[list[Message], str, dict[str, Any]], Mapping[str, float]]


def grade(rubric: Rubric, messages: list[Message], response: str, meta: dict[str, Any]) -> dict[str, float]:
    """The parts that a rubric gives a response, `total` among them.

    `messages` and `meta` are those of a held-out prompt; `meta` is {} where its row has none. Raises whatever the rubric
    raises, TypeError where it returns no mapping of numbers, and ValueError where a number is not finite or `total` is
    missing.
    """
    given = rubric(messages, response, meta)
    if not isinstance(given, Mapping):
        raise TypeError(f"it returns {given!r}, which is no mapping of names to numbers")
    parts: dict[str, float] = {}
    for name, value in given.items():
        try:
            parts[str(name)] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"its part {name!r} is {value!r}, which is no number") from None
    if bad := [name for name, value in parts.items() if not math.isfinite(value)]:
        raise ValueError(f"its part {bad[0]!r} is {parts[bad[0]]}, which is not finite")
    if "total" not in parts:
        raise ValueError(f"it returns no `total`, but {', '.join(parts) or 'nothing'}")
    return parts
