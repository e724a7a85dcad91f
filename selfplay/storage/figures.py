"""The metrics of a run over its rounds, for the API, the page and Prometheus. What they cost does not grow with the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from selfplay.storage.ledger import Store
from selfplay.storage.schema import WIDTHS

MOST_POINTS = 300  # of a metric in a chart


def metrics(store: Store, names: Sequence[str], first: int = 0, last: int = 2**62) -> dict[int, dict[str, float]]:
    """Some metrics of the rounds from `first` to `last`: by round, then by name."""
    rows = store.query(
        "SELECT round, name, value FROM metrics WHERE round BETWEEN :first AND :last"
        " AND name IN (SELECT value FROM json_each(:names)) ORDER BY round",
        first=first, last=last, names=json.dumps(names),
    )  # fmt: skip
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["round"], {})[row["name"]] = row["value"]
    return found


def bucket(store: Store) -> int:
    """How many rounds share the lowest and the highest point of a chart; 1 where each round has its own."""
    last = store.last_round()
    if last <= MOST_POINTS:
        return 1
    return int(next((width for width in WIDTHS if last // width < MOST_POINTS // 2), WIDTHS[-1]))


def trends(store: Store, names: Sequence[str], together: Iterable[tuple[str, str]] = ()) -> dict[int, dict[str, float]]:
    """Some metrics over all rounds, for charts: by round, then by name; at most MOST_POINTS values of each.

    Of a long run, each bucket of rounds gives the lowest and the highest value of a metric. So every peak stays, and no
    value is made up. `together`: pairs of metrics of which the second comes in the rounds of the first.
    """
    width = bucket(store)
    if width == 1:
        return metrics(store, names)
    rows = store.query(
        "SELECT name, low, low_round, high, high_round FROM trends"
        " WHERE width = :width AND name IN (SELECT value FROM json_each(:names))",
        width=width, names=json.dumps(names),
    )  # fmt: skip
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["low_round"], {})[row["name"]] = row["low"]
        found.setdefault(row["high_round"], {})[row["name"]] = row["high"]
    found = dict(sorted(found.items()))
    for first, second in together:
        there = [index for index, values in found.items() if first in values]
        for values in found.values():
            values.pop(second, None)
        for row in store.query(
            "SELECT round, value FROM metrics WHERE name = :name AND round IN (SELECT value FROM json_each(:rounds))",
            name=second, rounds=json.dumps(there),
        ):  # fmt: skip
            found[row["round"]][second] = row["value"]
    return {index: values for index, values in found.items() if values}


def rejected(store: Store, among: Iterable[int]) -> list[int]:
    """Which of some rounds were rejected."""
    rows = store.query(
        "SELECT round FROM rounds WHERE state = 'rejected' AND round IN (SELECT value FROM json_each(:among))",
        among=json.dumps(list(among)),
    )
    return [row["round"] for row in rows]


def newest(store: Store, name: str, default: float, rounds: int = 50) -> float:
    """The newest value of a metric within the last rounds."""
    rows = store.query(
        "SELECT value FROM metrics WHERE name = :name AND round > (SELECT max(round) FROM rounds) - :rounds"
        " ORDER BY round DESC LIMIT 1",
        name=name,
        rounds=rounds,
    )
    return float(rows[0]["value"]) if rows else default


def latest(store: Store, names: Iterable[str], rounds: int = 50) -> dict[str, float]:
    """The newest value of some metrics within the last rounds: a round that was skipped has few of its own."""
    rows = store.query(
        "SELECT asked.value AS name, (SELECT value FROM metrics WHERE name = asked.value"
        " AND round > (SELECT max(round) FROM rounds) - :rounds ORDER BY round DESC LIMIT 1) AS newest"
        " FROM json_each(:names) AS asked",
        names=json.dumps(list(names)),
        rounds=rounds,
    )
    return {row["name"]: row["newest"] for row in rows if row["newest"] is not None}
