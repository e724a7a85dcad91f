import json

import pytest

from selfplay.planning.gantt import Span
from selfplay.web.api_models import Histogram
from selfplay.web.page import charts as page_charts
from selfplay.web.page.charts import charts, names, options, who_worked
from selfplay.web.page.lists import kept_and_dropped

CHARTS = charts(["total", "accuracy", "politeness"])
METRICS = names(CHARTS)


def test_charts_hold_the_ledgers_numbers():
    metrics = {n: dict.fromkeys(METRICS, n + 0.5) for n in (1, 2, 4)}
    metrics[3] = {"evaluate/reward": float("nan")}
    for chart in CHARTS:
        drawn = options(chart, metrics, rejected=[2])
        text = json.dumps(drawn, allow_nan=False)
        assert [1, 1.5] in json.loads(text)["series"][-1]["data"] or drawn["series"][-1]["name"] == "rejected"
        assert drawn["tooltip"]["renderMode"] == "richText"  # a tooltip is drawn, never markup
        assert ":" not in "".join(keys(drawn))  # keys with a colon are JavaScript to the page's framework
    assert options(CHARTS[0], {}) is None
    reward = options(CHARTS[0], metrics, rejected=[2])
    assert reward["series"][-1] == {**reward["series"][-1], "name": "rejected", "data": [(2, 2.5)]}


def test_the_gold_chart_names_the_parts_of_any_rubric():
    (gold,) = [chart for chart in CHARTS if chart.title == "Gold"]
    drawn = options(gold, {1: {f"evaluate/gold_{part}": 0.5 for part in ("total", "accuracy", "politeness")}})
    assert drawn["legend"]["data"] == ["total", "accuracy", "politeness"]
    assert len({line["itemStyle"]["color"] for line in drawn["series"]}) == 3
    assert {"evaluate/gold_politeness", "evaluate/audit_gold_total"} <= set(METRICS)
    assert "Gold" not in [chart.title for chart in charts([])]
    many = charts([f"part {i}" for i in range(9)])[2]
    assert len(many.lines) == 10


def test_a_band_lies_between_its_bounds():
    drawn = options(
        CHARTS[1], {1: {"evaluate/win_rate": 0.5, "evaluate/win_rate_low": 0.4, "evaluate/win_rate_high": 0.75}}
    )
    clear, shaded = drawn["series"][:2]
    assert (clear["data"], [round(v, 9) for _, v in shaded["data"]]) == ([(1, 0.4)], [0.35])
    assert drawn["legend"]["data"] == ["against champion"]


def test_bars():
    drawn = page_charts.histogram(Histogram(edges=[0.0, 1.0, 2.0], kept=[1, 2], dropped=[3, 0]))
    assert drawn["xAxis"]["data"] == ["0.5", "1.5"]
    assert [s["data"] for s in drawn["series"]] == [[1, 2], [3, 0]]
    assert page_charts.histogram(Histogram(edges=[], kept=[], dropped=[])) is None


def test_each_role_has_a_line_with_its_stages_where_they_were():
    """Ten seconds: the engine samples for four and serves for two more at the end, the reward scores in between."""
    spans = [
        Span(lane="engine", what="generate", start=0, seconds=4),
        Span(lane="reward", what="score", start=4, seconds=3, busy=0.5),
        Span(lane="engine", what="evaluate", start=8, seconds=2),
    ]
    drawn = who_worked(spans)
    assert drawn["yAxis"]["data"] == ["engine 60%", "reward 15%"] and drawn["xAxis"]["max"] == 10
    seconds = [[bar["value"] if isinstance(bar, dict) else bar for bar in series["data"]] for series in drawn["series"]]
    assert seconds == [[0, 4], [4, 3], [4, 0], [2, 0]]
    assert [bar["label"]["formatter"] for bar in drawn["series"][1]["data"]] == ["generate", "score"]
    assert [bar["label"]["show"] for bar in drawn["series"][1]["data"]] == [True, True]
    narrow = who_worked(
        [*spans, Span(lane="reward", what="score", start=9, seconds=1)]
    )  # a tenth: no room for five letters
    assert narrow["series"][3]["data"][1]["label"] | {"show": False} == narrow["series"][3]["data"][1]["label"]
    json.dumps(drawn, allow_nan=False)
    assert ":" not in "".join(keys(drawn)) and who_worked([]) is None


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ({"base": 153, "potential": 39}, "153 kept, 39 dropped (potential)"),
        ({"base": 10, "noise": 1, "potential": 9}, "10 kept, 10 dropped (1 noise, 9 potential)"),
        ({"noise": 4}, "0 kept, 4 dropped (noise)"),
        ({"base": 7}, "7 kept"),
        ({}, "–"),
    ],
)
def test_pairs_of_a_round_in_words(pairs, words):
    assert kept_and_dropped(pairs) == words


def test_a_legend_of_several_lines_leaves_the_axis_alone():
    guard = next(chart for chart in CHARTS if chart.title == "Guard")
    few, many = options(CHARTS[1], {1: {"evaluate/win_rate": 0.5}}), options(guard, {1: dict.fromkeys(METRICS, 0.5)})
    assert few["grid"]["bottom"] == 30 and many["grid"]["bottom"] >= 30 + 2 * 17


def keys(value):
    if isinstance(value, dict):
        for key, below in value.items():
            yield key
            yield from keys(below)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from keys(below)
