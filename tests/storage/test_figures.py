"""Metrics over the rounds of a run, short and long."""

import math
import random

import pytest

from selfplay.storage import figures
from selfplay.storage.ledger import Store

ROUNDS = 700


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A long run with noisy metrics, one peak, and a metric that only some rounds have."""
    store, rng, values = Store(tmp_path_factory.mktemp("run")), random.Random(0), {}
    for index in range(1, ROUNDS + 1):
        found = {"low": rng.random(), "mean": rng.gauss(0, 1)}
        found["high"] = found["low"] + rng.random()
        if index % 50 == 0:
            found["rare"] = float(index)
        if index == 432:
            found["mean"] = 99.0
        store.open_round(index, 0, (0, 0), "f", {})
        store.record_stage(index, "a", 1.0, found)
        store.close_round(index, "rejected" if index % 3 == 0 else "promoted", 0, [])
        values[index] = {f"a/{name}": value for name, value in found.items()}
    yield store, values
    store.close()


NAMES = ("a/low", "a/high", "a/mean", "a/rare")


@pytest.mark.slow
def test_a_chart_of_a_long_run_keeps_every_peak_and_makes_nothing_up(run):
    store, values = run
    found = figures.trends(store, NAMES)
    assert list(found) == sorted(found)
    for name in NAMES:
        drawn = {index: row[name] for index, row in found.items() if name in row}
        assert 0 < len(drawn) <= figures.MOST_POINTS
        assert all(value == values[index][name] for index, value in drawn.items())
        everywhere = {index: row[name] for index, row in values.items() if name in row}
        assert max(drawn.values()) == max(everywhere.values()) and min(drawn.values()) == min(everywhere.values())
    assert len([row for row in found.values() if "a/mean" in row]) > 150
    assert found[432]["a/mean"] == 99.0
    assert {index for index, row in found.items() if "a/rare" in row} == set(range(50, 701, 50))


@pytest.mark.slow
def test_the_bounds_of_a_band_come_of_the_same_rounds(run):
    store, values = run
    found = figures.trends(store, ("a/low", "a/high"), [("a/low", "a/high")])
    assert all(row == {name: values[index][name] for name in ("a/low", "a/high")} for index, row in found.items())


def test_a_short_run_is_drawn_whole(tmp_path):
    store = Store(tmp_path)
    assert figures.trends(store, NAMES) == {}
    for index in (1, 2, 3):
        store.open_round(index, 0, (0, 0), "f", {})
        store.record_stage(index, "a", 1.0, {"low": index, "other": 0.0})
    assert figures.trends(store, NAMES, [("a/low", "a/high")]) == {i: {"a/low": float(i)} for i in (1, 2, 3)}
    store.close()


def test_a_value_that_no_chart_can_show_hides_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "MOST_POINTS", 4)
    store = Store(tmp_path)
    for index in range(1, 9):
        store.open_round(index, 0, (0, 0), "f", {})
        store.record_stage(index, "a", 1.0, {"low": math.inf if index % 2 else float(index)})
    assert {i: row["a/low"] for i, row in figures.trends(store, NAMES).items()} == {2: 2.0, 6: 6.0, 8: 8.0}
    store.close()


def test_which_of_some_rounds_were_rejected(tmp_path):
    store = Store(tmp_path)
    for index in range(1, 10):
        store.open_round(index, 0, (0, 0), "f", {})
        store.close_round(index, "rejected" if index % 3 == 0 else "promoted", 0, [])
    assert figures.rejected(store, [1, 3, 6, 7, 8]) == [3, 6]
    store.close()
