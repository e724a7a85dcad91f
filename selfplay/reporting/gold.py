"""The parts of the gold rubric, by the names that the user's rubric gives them.

The evaluation records the mean of each part as a metric: `evaluate/gold_<part>` for the candidate, the same with
`_champion` for the champion, `evaluate/audit_gold_<part>` on the audit set, and that with `_initial` for the initial policy.
What shows gold scores asks here which parts there are. `total` is always one of them, and comes first.
"""

from __future__ import annotations

from collections.abc import Iterable

from selfplay.storage.ledger import Store

RECENT = 50  # rounds in which `recorded` looks for names


def parts(names: Iterable[str]) -> list[str]:
    """The parts that are among the names of some metrics; `total` first, the others in the order of the alphabet."""
    found = set()
    for name in names:
        if name.startswith("evaluate/gold_"):
            found.add(name.removeprefix("evaluate/gold_").removesuffix("_champion"))
        elif name.startswith("evaluate/audit_gold_") and name != "evaluate/audit_gold_win_rate":
            found.add(name.removeprefix("evaluate/audit_gold_").removesuffix("_initial"))
    return sorted(found, key=lambda part: (part != "total", part))


def champion_and_candidate(part: str) -> tuple[str, str]:
    """The metrics of a part on the prompts of the gate, before and after."""
    return f"evaluate/gold_{part}_champion", f"evaluate/gold_{part}"


def initial_and_candidate(part: str) -> tuple[str, str]:
    """The metrics of a part on the audit set, before and after."""
    return f"evaluate/audit_gold_{part}_initial", f"evaluate/audit_gold_{part}"


def recorded(store: Store) -> list[str]:
    """The parts that the last rounds of a run have; the cost does not grow with the run."""
    rows = store.query(
        # CROSS JOIN has SQLite look round by round: by its own choice it would look at the names of all rounds.
        "SELECT DISTINCT name FROM rounds CROSS JOIN metrics USING (round)"
        " WHERE round > (SELECT max(round) FROM rounds) - :recent AND name GLOB 'evaluate/*gold_*'",
        recent=RECENT,
    )
    return parts(row["name"] for row in rows)
