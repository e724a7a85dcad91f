"""Numbers and verdicts in words, for the terminal, the report and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

NOT_INDEPENDENT = "gate not independent: the judge is the reward that trains"

Metrics = Mapping[str, float]


def number(value: float | None, form: str = ".3g") -> str:
    """A number in the given format; an absent or non-finite one is a dash."""
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def change(m: Metrics, before: str, after: str, form: str = ".3f", arrow: str = " → ") -> str:
    """«before → after», or the one that is there; empty when neither is."""
    return arrow.join(number(m[name], form) for name in (before, after) if name in m)


def join(parts: Iterable[str], separator: str = " · ") -> str:
    return separator.join(part for part in parts if part)


def interval(m: Metrics, prefix: str = "evaluate/win_rate") -> str:
    """«0.612 [0.541, 0.680]», the bounds where they are known."""
    if prefix not in m:
        return ""
    low, high = m.get(f"{prefix}_low"), m.get(f"{prefix}_high")
    return number(m[prefix], ".3f") + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")


def verdict(outcome: str, policy: int | None, reasons: Iterable[str]) -> str:
    """The verdict of a round in plain words."""
    why = "; ".join(reasons)
    if outcome == "promoted":
        return f"promoted: policy {policy} serves from here on"
    if outcome == "rejected":
        return f"rejected by the gate: {why or 'no reason recorded'}; policy {policy} goes on"
    if outcome == "cancelled":
        return f"cancelled: {why or 'given up'}; policy {policy} goes on"
    if outcome == "skipped":
        return f"skipped: {why or 'no pairs to train on'}; policy {policy} goes on"
    return "unfinished: the same command goes on where it was"
