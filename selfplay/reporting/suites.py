"""The suites that a run reports, by the names that the configuration gives them.

The stage records `suite/NAME/score` for the candidate and `suite/NAME/score_champion`, their difference, and the bounds of each
(`evaluation/suites.py`). What shows scores of suites asks here which there are.
"""

from __future__ import annotations

from collections.abc import Iterable

from selfplay.storage.ledger import Store

RECENT = 50  # rounds in which `recorded` looks for names
FIRST, LAST = "suite/", "/score"


def names(metrics: Iterable[str]) -> list[str]:
    """The suites that are among the names of some metrics, in the order of the alphabet."""
    return sorted(
        name.removeprefix(FIRST).removesuffix(LAST)
        for name in metrics
        if name.startswith(FIRST) and name.endswith(LAST)
    )


def champion_and_candidate(name: str) -> tuple[str, str]:
    """The metrics of a suite's score, before and after."""
    return f"{FIRST}{name}{LAST}_champion", f"{FIRST}{name}{LAST}"


def difference(name: str) -> str:
    """The metric of how much more the candidate has; its bounds have `_low` and `_high` behind it."""
    return f"{FIRST}{name}/difference"


def recorded(store: Store) -> list[str]:
    """The suites that the last rounds of a run have; the cost does not grow with the run."""
    rows = store.query(
        # CROSS JOIN as in `gold.recorded`.
        "SELECT DISTINCT name FROM rounds CROSS JOIN metrics USING (round)"
        " WHERE round > (SELECT max(round) FROM rounds) - :recent AND name GLOB 'suite/*/score'",
        recent=RECENT,
    )
    return names(row["name"] for row in rows)
