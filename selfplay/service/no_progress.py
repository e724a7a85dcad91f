"""Rounds in a row that changed no policy: when they pause the service, and what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfplay.pairs.selection import advice, why_none

Rows = Sequence[dict[str, Any]]


def why_pause(
    last: Rows, limit: int, resumed: int, metrics: Callable[[int], Mapping[str, float]]
) -> tuple[str, str] | None:
    """Kind (rejected, skipped) and reason of a pause, where the newest rounds were all rejected or skipped; else None.

    last: the newest rounds, oldest first, `limit` of them where there are so many; resumed: the newest round at the time a
    person last resumed the service, after whom it takes another one; metrics: those of a round, by name.
    """
    states = Counter(row["state"] for row in last)
    if states["rejected"] + states["skipped"] < limit or last[-1]["round"] <= resumed:
        return None
    because = f"the last because: {'; '.join(last[-1]['reasons'])}"
    if not states["skipped"]:
        return "rejected", f"{limit} rounds in a row were rejected, {because}"
    said = _lost([metrics(row["round"]) for row in last if row["state"] == "skipped"])
    if not states["rejected"]:
        return "skipped", f"{limit} rounds in a row were skipped, for no pair was left to train on{said}"
    return last[-1]["state"], (
        f"{limit} rounds in a row changed nothing: {states['rejected']} were rejected, {states['skipped']} skipped, for no pair "
        f"was left to train on{said}; {because}"
    )


def _lost(skipped: Sequence[Mapping[str, float]]) -> str:
    """What skipped rounds lost their pairs to, and what to change: «: of 96 prompts, 90 …; 95% of the answers …»."""
    found: Counter[str] = Counter()
    for metrics in skipped:
        found.update(
            {name.removeprefix("pairs/"): value for name, value in metrics.items() if name.startswith("pairs/")}
        )
    prompts = sum(value for name, value in found.items() if name == "base" or name.startswith("prompts_"))
    cut_off = sum(metrics.get("generate/cut_off_share", 0.0) for metrics in skipped) / len(skipped)
    counts = why_none(found).removeprefix(": ")
    parts = [f"of {prompts:.0f} prompts, {counts}" if counts else "", f"{cut_off:.0%} of the answers were cut off"]
    if change := advice(found, cut_off):
        parts.append(f"what to change: {change}")
    return f": {'; '.join(part for part in parts if part)}"
