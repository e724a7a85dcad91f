"""How the charts of a report look: their colours, and what they are drawn with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from selfplay.reporting.history import Run

# light, dark: a role has one colour in every chart. Each light one is unique, so the page can swap it for a variable.
COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "soft": ("#6b7280", "#9aa4b2"),
    "faint": ("#d5d9e0", "#3a4250"),
    "ground": ("#fffffe", "#161b22"),
    "blue": ("#2563c9", "#6ea8fe"),
    "orange": ("#d9730d", "#ffa657"),
    "green": ("#1a8f5a", "#56d08f"),
    "purple": ("#8046c7", "#c297ff"),
    "red": ("#c9363a", "#ff7b72"),
    "teal": ("#0e8a9c", "#4fd0e0"),
    "grey": ("#a3abb8", "#7d8898"),
}
C = {name: light for name, (light, _) in COLOURS.items()}
MANY = 40  # rounds past which markers and bars give way to plain lines and areas


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    caption: str  # what it shows, and the unit
    draw: Callable[[Any, Run], None]  # into axes of matplotlib
    counts: bool = False  # whether the vertical axis counts things


def line(ax: Any, run: Run, name: str, label: str, colour: str, **style: Any) -> None:
    """One metric by round. An absent one draws nothing. A line goes on over rounds without it, since some are skipped."""
    x, y = run.series(name)
    if x:
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6} | style
        if len(run.states) > MANY:  # markers would run into each other
            style |= {"marker": "", "linewidth": 0.9, "linestyle": style.get("linestyle") or "-"}
        ax.plot(x, y, color=C[colour], label=label, **style)


def hollow(ax: Any, run: Run, name: str, colour: str) -> None:
    """Mark rounds that the gate rejected with an empty circle over the point."""
    points = [(index, value) for index, value in run.figures.get(name, []) if run.states.get(index) == "rejected"]
    if points:
        few = len(run.states) <= MANY
        ax.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=5 if few else 3, markerfacecolor=C["ground"], markeredgecolor=C[colour], markeredgewidth=1.4 if few else 0.8)  # fmt: skip


def beyond(ax: Any, limits: Iterable[float]) -> None:
    """Draw those limits of the gate that the data come near. A limit far away would flatten everything else."""
    low, high = ax.get_ylim()
    room = high - low
    near = [limit for limit in limits if low - 0.5 * room <= limit <= high + 0.5 * room]
    for limit in near:
        ax.axhline(limit, color=C["red"], linewidth=1, linestyle="--", label="limit of the gate")
    if near:  # the view may have been set before, and would not grow by itself
        ax.set_ylim(min(low, min(near) - 0.04 * room), max(high, max(near) + 0.04 * room))


def stacked(
    ax: Any, x: Sequence[int], values: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[str]
) -> None:
    """Rows of values (rows, rounds) on top of each other: bars, or areas where there are many rounds."""
    if len(x) > MANY:
        ax.stackplot(x, *values, labels=labels, colors=[C[c] for c in colours], linewidth=0)
        return
    base = [0.0] * len(x)
    for row, label, colour in zip(values, labels, colours, strict=True):
        ax.bar(x, row, 0.62, bottom=base, label=label, color=C[colour], linewidth=0)
        base = [b + v for b, v in zip(base, row, strict=True)]


def histogram(ax: Any, run: Run, field: str) -> None:
    """Base pairs by a margin. The kept ones are at the bottom of each bar."""
    groups = [
        [v for p in run.pairs if bool(p.kept_because) == kept and math.isfinite(v := getattr(p, field))]
        for kept in (True, False)
    ]
    bins = min(30, max(8, round(math.sqrt(len(run.pairs)) * 1.5)))
    ax.hist(
        groups,
        bins=bins,
        stacked=True,
        color=[C["blue"], C["grey"]],
        label=["kept", "dropped"],
        rwidth=0.92,
        linewidth=0,
    )
    ax.set_ylabel("base pairs")
