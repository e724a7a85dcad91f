"""The charts of the page as ECharts options: pure functions of the numbers in the ledger.

The only words of others in them are the names of the rubric's parts. ECharts draws them, and never reads them as markup.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfplay.planning.gantt import Span, length
from selfplay.reporting import gold, suites
from selfplay.reporting import who_worked as who
from selfplay.web.api_models import Histogram

Metrics = Mapping[int, Mapping[str, float]]  # by round, then by name
Points = list[tuple[int, float]]

# One tone for light and dark grounds: readable on both.
COLOURS = {
    "blue": "#3f85dd", "orange": "#dd7f27", "green": "#2e9e67", "purple": "#9467d6", "red": "#d65055", "teal": "#1c9fb0",
    "grey": "#8b95a3",
}  # fmt: skip
STAGE_COLOURS = {"generate": "blue", "score": "teal", "depth": "green", "train": "orange", "evaluate": "purple"}
LETTER = 0.033  # share of a round that a letter of a stage's name takes in its bar, on the narrowest screen
ENTRY, LINE = (
    6.2,
    17,
)  # pixels of a character in the legend, with what stands beside a name counted apart, and of its lines
NARROWEST = 330  # pixels of a chart on the narrowest screen
FAINT = "rgba(139, 149, 163, 0.25)"


@dataclass(frozen=True, slots=True)
class Line:
    """One metric by round."""

    metric: str
    label: str
    colour: str
    style: str = "solid"  # solid | dashed | dotted


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    caption: str  # what it shows, and the unit
    lines: tuple[Line, ...]
    band: tuple[str, str] | None = None  # metrics of the lower and upper bound of the first line
    level: float | None = None  # a horizontal line
    log: bool = False


# The charts that any run has; `charts` adds that of the gold scores.
CHARTS = (
    Chart("Reward", "mean; champion and candidate on the same held-out prompts", (
        Line("evaluate/reward", "candidate", "blue"), Line("evaluate/reward_champion", "champion", "grey", "dashed"),
        Line("score/reward_mean", "sampled", "teal", "dotted"))),
    Chart("Win rate", "candidate against champion, ties half, with its interval", (
        Line("evaluate/win_rate", "against champion", "blue"), Line("evaluate/audit_win_rate", "against initial", "purple", "dotted")),
        band=("evaluate/win_rate_low", "evaluate/win_rate_high"), level=0.5),
    Chart("β", "of ε-DPO, at start and end of the training", (
        Line("train/beta_start", "start", "grey", "dashed"), Line("train/beta", "end", "orange")), log=True),
    Chart("Length", "mean answer length of the candidate over the champion's", (
        Line("evaluate/length_ratio", "ratio", "teal"),), level=1.0),
    Chart("KL", "of the candidate, nats an answer", (
        Line("evaluate/kl_current", "to current", "purple"), Line("evaluate/kl_initial", "to initial", "grey", "dashed"))),
    Chart("Guard", "signs that the reward goes wrong; limits are in the section guard of the configuration", (
        Line("guard/ties", "ties", "blue"), Line("guard/saturation", "saturation", "orange"),
        Line("guard/length_correlation", "correlation with length", "teal"), Line("guard/shift", "shift", "purple"),
        Line("guard/disagreement", "disagreement", "green"), Line("guard/gold_drop", "fall of gold", "red"),
        Line("guard/probe_change", "change of the probes", "grey", "dashed"),
        Line("guard/probe_missing", "probes without a score", "purple", "dashed"))),
    Chart("Answers before training", "signs that pairs would teach a length, or to say the same again; limits are in the section guard", (
        Line("guard/cut_off", "cut off", "red"), Line("guard/length_gap", "length of chosen against rejected", "blue"),
        Line("guard/decided_by_length", "pairs decided by length", "orange"), Line("guard/duplicates", "duplicates", "grey", "dashed"),
        Line("guard/repetition", "repeated 4-grams", "teal"))),
    Chart("Margins", "mean of the kept pairs: explicit in reward units, implicit in nats a token", (
        Line("pairs/explicit_margin", "explicit", "blue"), Line("pairs/implicit_margin", "implicit", "purple"))),
    Chart("Pairs", "base pairs, those kept, those trained on", (
        Line("pairs/base", "base", "grey", "dashed"), Line("pairs/kept", "kept", "blue"), Line("depth/pairs", "trained on", "orange"))),
)  # fmt: skip
GOLD_PLACE = 2  # of the chart of gold scores among the others
PART_COLOURS = ("orange", "green", "blue", "purple", "teal", "red")  # of the rubric's parts, total first


def charts(parts: Sequence[str], benchmarks: Sequence[str] = ()) -> list[Chart]:
    """All charts of a run whose rubric has these parts, and which has these suites."""
    added = [found for found in (_gold(parts), _suites(benchmarks)) if found is not None]
    return [*CHARTS[:GOLD_PLACE], *added, *CHARTS[GOLD_PLACE:]]


def _suites(benchmarks: Sequence[str]) -> Chart | None:
    """The scores of the suites; of a single one the interval and the champion's score too."""
    scores = [suites.champion_and_candidate(name) for name in benchmarks]
    if not scores:
        return None
    lines = [
        Line(candidate, name, colour)
        for name, (_, candidate), colour in zip(benchmarks, scores, itertools.cycle(PART_COLOURS), strict=False)
    ]
    if len(scores) > 1:
        return Chart("Suites", "mean score of the candidate on benchmarks between rounds", tuple(lines))
    champion, candidate = scores[0]
    return Chart(
        "Suites", "mean score of candidate and champion on a benchmark between rounds, with the candidate's interval",
        (*lines, Line(champion, "champion", "grey", "dashed")), band=(f"{candidate}_low", f"{candidate}_high"),
    )  # fmt: skip


def _gold(parts: Sequence[str]) -> Chart | None:
    if not parts:
        return None
    lines = [
        Line(gold.champion_and_candidate(part)[1], part, colour)
        for part, colour in zip(parts, itertools.cycle(PART_COLOURS))
    ]
    lines.append(Line(gold.initial_and_candidate("total")[1], "total, audit", PART_COLOURS[0], "dotted"))
    return Chart("Gold", "mean by the gold rubric, which never trains nor gates", tuple(lines))


def names(shown: Sequence[Chart]) -> list[str]:
    """The metrics that some charts show."""
    return sorted({n for c in shown for n in (*(line.metric for line in c.lines), *(c.band or ()))})


def series(metrics: Metrics, name: str) -> Points:
    """The finite values of a metric by round."""
    return [(index, found[name]) for index, found in metrics.items() if math.isfinite(found.get(name, math.nan))]


def options(chart: Chart, metrics: Metrics, rejected: Sequence[int] = ()) -> dict[str, Any] | None:
    """ECharts options of a chart; None where none of its metrics is there. Rejected rounds are hollow points."""
    drawn: list[dict[str, Any]] = []
    if chart.band is not None:
        drawn += _band(metrics, *chart.band)
    shown = [(line, points) for line in chart.lines if (points := series(metrics, line.metric))]
    if not shown:
        return None
    for line, points in shown:
        drawn.append(
            {
                "name": line.label, "type": "line", "data": points, "showSymbol": len(points) <= 40, "symbolSize": 5,
                "lineStyle": {"width": 1.6, "type": line.style, "color": COLOURS[line.colour]},
                "itemStyle": {"color": COLOURS[line.colour]}, "symbol": "circle",
            }
        )  # fmt: skip
    if chart.level is not None:
        drawn[-1]["markLine"] = {
            "silent": True, "symbol": "none", "label": {"show": False}, "data": [{"yAxis": chart.level}],
            "lineStyle": {"color": COLOURS["grey"], "type": "solid", "width": 1},
        }  # fmt: skip
    points = shown[0][1]
    hollow = [p for p in points if p[0] in set(rejected)]
    if hollow and chart.title in ("Reward", "Win rate", "Length", "KL", "Suites"):
        drawn.append(
            {"name": "rejected", "type": "scatter", "data": hollow, "symbolSize": 7, "z": 5, "itemStyle": {
                "color": "transparent", "borderColor": COLOURS["red"], "borderWidth": 1.6, "opacity": 1}}
        )  # fmt: skip
    values = [v for _, p in shown for _, v in p]
    log = chart.log and min(values) > 0 and max(values) > 10 * min(values)
    names = [s["name"] for s in drawn if "name" in s]
    return _frame(drawn, names, {"type": "log" if log else "value", "scale": True})


def _band(metrics: Metrics, low: str, high: str) -> list[dict[str, Any]]:
    """The area between two metrics: a clear one up to the lower, and on top of it a shaded one."""
    both = {i: (m[low], m[high]) for i, m in metrics.items() if low in m and high in m}
    rounds = sorted(both)
    clear = {
        "type": "line",
        "stack": "band",
        "symbol": "none",
        "silent": True,
        "lineStyle": {"width": 0},
        "tooltip": {"show": False},
    }
    return [
        {**clear, "data": [(i, both[i][0]) for i in rounds]},
        {**clear, "data": [(i, both[i][1] - both[i][0]) for i in rounds], "areaStyle": {"color": COLOURS["blue"], "opacity": 0.18}},
    ]  # fmt: skip


def _frame(drawn: list[dict[str, Any]], names: list[str], y: dict[str, Any]) -> dict[str, Any]:
    lines = _legend_lines(names)
    axis = {
        "axisLabel": {"color": COLOURS["grey"], "fontSize": 11, "hideOverlap": True}, "axisTick": {"show": False},
        "axisLine": {"lineStyle": {"color": FAINT}}, "splitLine": {"lineStyle": {"color": FAINT}},
    }  # fmt: skip
    return {
        "animation": False, "backgroundColor": "transparent", "textStyle": {"fontFamily": "inherit"},
        "grid": {"left": 8, "right": 14, "top": 10, "bottom": 13 + LINE * lines, "containLabel": True},
        "legend": {"data": names, "bottom": 0, "itemWidth": 16, "itemHeight": 8, "textStyle": {"color": COLOURS["grey"], "fontSize": 11}},
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        "xAxis": {**axis, "type": "value", "min": "dataMin", "max": "dataMax", "minInterval": 1, "splitLine": {"show": False}},
        "yAxis": {**axis, "splitNumber": 4, **y},
        "series": drawn,
    }  # fmt: skip


def _legend_lines(names: Sequence[str]) -> int:
    """Lines that a legend takes on the narrowest screen: ECharts breaks it, and does not move the axis out of its way."""
    lines, used = 1, 0.0
    for name in names:
        width = 31 + ENTRY * len(name)  # with its mark, and the gap to the next one
        if used and used + width > NARROWEST:
            lines, used = lines + 1, 0.0
        used += width
    return lines


def histogram(found: Histogram) -> dict[str, Any] | None:
    """Bars of the kept and, on top of them, the dropped pairs of a round; None where there are none."""
    if not found.edges:
        return None
    middles = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
    bar = {"type": "bar", "stack": "pairs", "barCategoryGap": "8%"}
    drawn = [
        {**bar, "name": "kept", "data": found.kept, "itemStyle": {"color": COLOURS["blue"]}},
        {**bar, "name": "dropped", "data": found.dropped, "itemStyle": {"color": COLOURS["grey"]}},
    ]
    chart = _frame(drawn, ["kept", "dropped"], {"type": "value", "minInterval": 1})
    chart["xAxis"] |= {"type": "category", "data": [f"{v:.3g}" for v in middles]}
    for name in ("min", "max", "minInterval"):
        del chart["xAxis"][name]
    return chart


def who_worked(spans: Sequence[Span]) -> dict[str, Any] | None:
    """A bar for each stage of a round, on the line of the role that worked in it, over the seconds of the round.

    ECharts stacks bars: each is put on top of a clear one, which is the time in which its role did nothing.
    """
    lanes = who.lanes(spans)
    if not lanes:
        return None
    whole = length(spans)
    rows = {lane: [span for span in spans if span.lane == lane] for lane, _ in lanes}
    series: list[dict[str, Any]] = []
    for place in range(max(map(len, rows.values()))):
        gaps: list[Any] = []
        bars: list[Any] = []
        for row in rows.values():
            if place >= len(row):
                gaps.append(0)
                bars.append(0)
                continue
            span, before = row[place], max((earlier.end for earlier in row[:place]), default=0.0)
            start = max(span.start, before)
            took = max(0.0, span.end - start)
            gaps.append(round(start - before, 2))
            shown = {
                "show": took > LETTER * len(span.what) * whole,
                "position": "inside",
                "formatter": span.what,
                "color": "#fff",
                "fontSize": 11,
            }
            colour = COLOURS[STAGE_COLOURS.get(span.what, "grey")]
            bars.append(
                {
                    "value": round(took, 2),
                    "itemStyle": {"color": colour, "opacity": 0.4 + 0.6 * span.busy},
                    "label": shown,
                }
            )
        bar = {"type": "bar", "stack": "round", "barWidth": "62%"}
        clear = {"itemStyle": {"color": "transparent"}, "silent": True, "tooltip": {"show": False}}
        series += [{**bar, **clear, "data": gaps}, {**bar, "name": "seconds", "data": bars}]
    chart = _frame(series, [], {})
    label = chart["yAxis"]["axisLabel"]
    chart["yAxis"] = {"type": "category", "data": [f"{lane} {share:.0%}" for lane, share in lanes], "inverse": True, "axisLabel": label,
                      "axisTick": {"show": False}, "axisLine": {"lineStyle": {"color": FAINT}}}  # fmt: skip
    chart["xAxis"] = {
        "type": "value",
        "max": round(whole, 2),
        "axisLabel": label,
        "splitLine": {"lineStyle": {"color": FAINT}},
    }
    chart["grid"] |= {"bottom": 8}
    chart["tooltip"]["trigger"] = "item"
    del chart["legend"]
    return chart
