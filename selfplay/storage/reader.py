"""What can be asked of a ledger. `Store` is a reader that writes too."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from selfplay.storage.schema import draws, events, metrics, orders, pairs, policies, rounds, runs, stages, state

CURRENT = "current"
"""In the ledger's state: {version, before}, the policy that serves, and what the file `current` named before it."""
CANCEL = "cancel"
"""In the ledger's state: the number of a round that is to be given up. No other round is taken for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands, as far as a service asks once a second."""

    open: int | None  # number of the round that is open
    ordered: bool  # whether orders wait
    states: dict[str, Any]  # what was kept under some names, by name


class Reader:
    """Reads an open ledger. Rows are dicts by the names of their columns; all times are UTC, ISO 8601.

    Raises LedgerError where the ledger does not answer.
    """

    def __init__(self, path: Path, engine: sa.Engine) -> None:
        self.path, self._engine = path, engine

    def close(self) -> None:
        self._engine.dispose()

    def query(self, text: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a SELECT with `:name` for values (`paging`); JSON columns come as text."""
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(_text(text), values).mappings()]

    def pending(self, kinds: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Number, time and kind of the orders that wait, oldest first; only those of some kinds if any are given."""
        wanted = set(kinds)
        return [row for row in self._rows(_PENDING) if not wanted or row["kind"] in wanted]

    def order(self, number: int) -> dict[str, Any]:
        """One order."""
        return self._rows(ORDER, number=number)[0]

    def state(self, name: str, default: Any = None) -> Any:
        """What was kept under a name."""
        with self._engine.connect() as connection:
            found = connection.scalar(_STATE, {"kept": name})
        return default if found is None else found

    def _rows(self, query: sa.Select[Any], **values: Any) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query, values).mappings()]

    def standing(self, names: Sequence[str]) -> Standing:
        """Where the run stands, with what was kept under `names`; in one query, for it is asked all the time."""
        (row,) = self.query(
            "SELECT (SELECT min(round) FROM rounds WHERE state = 'running') AS open,"
            " EXISTS (SELECT 1 FROM orders WHERE state = 'pending') AS ordered, (SELECT json_group_object(name, json(value))"
            " FROM state WHERE instr(:names, json_quote(name))) AS states",
            names=_as_json(tuple(names)),
        )
        return Standing(open=row["open"], ordered=bool(row["ordered"]), states=json.loads(row["states"]))

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds, oldest first, without their configurations."""
        return self._rows(_ROUNDS)

    def last_rounds(self, count: int) -> list[dict[str, Any]]:
        """The newest rounds, oldest first, without their configurations."""
        return self._rows(_LAST_ROUNDS, count=count)[::-1]

    def rounds_between(self, first: int, last: int) -> list[dict[str, Any]]:
        """The rounds from `first` to `last`, both included, oldest first, without their configurations."""
        return self._rows(_ROUNDS.where(rounds.c.round.between(first, last)))

    def round(self, index: int) -> dict[str, Any]:
        """One round, without its configuration."""
        return self._rows(_ROUND_OF, index=index)[0]

    def draw_before(self, index: int) -> dict[str, Any] | None:
        """What was kept last of the draws of earlier rounds."""
        return next(iter(self._rows(_DRAW_BEFORE, index=index)), None)

    def serving(self) -> int | None:
        """The policy that serves between rounds; None before the import.

        A ledger of an earlier version does not say so. There it is the policy of the last rollback that came after the last
        round had ended, else the one that this round left, else policy 0.
        """
        if (kept := self.state(CURRENT)) is not None:
            return int(kept["version"])
        if self.policy(0) is None:
            return None
        last = next(
            iter(self.query("SELECT policy, ended FROM rounds WHERE state != 'running' ORDER BY round DESC LIMIT 1")),
            None,
        )
        back = self._rows(
            sa.select(orders.c.arguments)
            .where(
                orders.c.kind == "rollback", orders.c.state == "done", orders.c.ended > (last["ended"] if last else "")
            )
            .order_by(orders.c.id.desc())
            .limit(1)
        )
        return int(back[0]["arguments"]["version"]) if back else int(last["policy"]) if last else 0

    def last_round(self) -> int:
        """Number of the last round that was opened; 0 before there is one."""
        with self._engine.connect() as connection:
            return int(connection.scalar(_LAST) or 0)

    def count_rounds(self) -> dict[str, int]:
        """How many rounds there are in each state."""
        return {name: int(count) for name, count in self.totals("rounds").items() if count}

    def cancelled(self, first: int, last: int) -> set[int]:
        """Numbers of the rounds from `first` to `last`, both included, that were given up."""
        there = rounds.c.round.between(first, last) & (rounds.c.state == "cancelled")
        return {row["round"] for row in self._rows(sa.select(rounds.c.round).where(there))}

    def config(self, index: int) -> dict[str, Any]:
        """The configuration that a round was last run with."""
        with self._engine.connect() as connection:
            found = connection.scalar(_CONFIG, {"index": index})
        return found if isinstance(found, dict) else {}

    def unfinished(self) -> dict[str, Any] | None:
        """The round that is open, without its configuration."""
        rows = self._rows(_UNFINISHED)
        return rows[0] if rows else None

    def totals(self, of: str) -> dict[str, float]:
        """Sums over the whole run by name. Of `rounds` by state and `events` by kind: how many; of `stages`: seconds; of
        `tokens`: what was sampled, by metric."""
        return self.all_totals().get(of, {})

    def all_totals(self) -> dict[str, dict[str, float]]:
        """All these sums, by what they are of and by name."""
        found: dict[str, dict[str, float]] = {}
        for row in self.query("SELECT * FROM totals"):
            found.setdefault(row["of"], {})[row["name"]] = row["value"]
        return found

    def metrics(self, index: int) -> dict[str, float]:
        """All metrics of a round, by name."""
        rows = self._rows(_METRICS, index=index)
        return {row["name"]: row["value"] for row in rows}

    def metric(self, index: int, name: str) -> float | None:
        """One metric of a round; None where the round has none of that name."""
        with self._engine.connect() as connection:
            there = (metrics.c.round == index) & (metrics.c.name == name)
            found: float | None = connection.scalar(sa.select(metrics.c.value).where(there))
        return found

    def metrics_by_round(self, names: Iterable[str]) -> dict[int, dict[str, float]]:
        """Some metrics of all rounds that have them."""
        found: dict[int, dict[str, float]] = {}
        for row in self._rows(sa.select(metrics).where(metrics.c.name.in_(list(names))).order_by(metrics.c.round)):
            found.setdefault(row["round"], {})[row["name"]] = row["value"]
        return found

    def run(self) -> dict[str, Any] | None:
        """Name, time of the first opening, and what is fixed; None before that."""
        return next(iter(self._rows(RUN)), None)

    def created(self) -> str:
        """When the run was first opened."""
        with self._engine.connect() as connection:
            return str(connection.scalar(_CREATED) or now())

    def seconds(self, index: int) -> dict[str, float]:
        """Seconds of each finished stage of a round, in the order they ended."""
        rows = self._rows(_STAGES, index=index)
        return {row["stage"]: row["seconds"] for row in rows}

    def policy(self, version: int) -> dict[str, Any] | None:
        """One policy; None where there is none of that number."""
        if not 0 <= version < 2**63:  # SQLite takes no greater number
            return None
        rows = self._rows(_POLICY, version=version)
        return rows[0] if rows else None

    def policies_with_weights(self) -> list[dict[str, Any]]:
        """The policies whose weights were not deleted, oldest first."""
        return self._rows(_WITH_WEIGHTS)

    def rounds_with_pairs(self, last: int, most: int) -> list[int]:
        """Numbers of rounds up to `last` that have rows of pairs: the oldest, `most` of them."""
        found: list[int] = []
        with self._engine.connect() as connection:
            while len(found) < most:
                after = pairs.c.round > found[-1] if found else sa.true()
                index = connection.scalar(sa.select(sa.func.min(pairs.c.round)).where(after, pairs.c.round <= last))
                if index is None:
                    break
                found.append(index)
        return found

    def policies(self) -> list[dict[str, Any]]:
        """All policies, oldest first."""
        return self._rows(_POLICIES)

    def events(self, index: int | None = None) -> list[dict[str, Any]]:
        return self._rows(_EVENTS if index is None else _EVENTS.where(events.c.round == index))


# What is asked all the time is built once: to build a statement takes longer than to run it.
_text = functools.lru_cache(256)(sa.text)
_as_json = functools.lru_cache(16)(json.dumps)
_STATE = sa.select(state.c.value).where(state.c.name == sa.bindparam("kept"))
_LAST = sa.select(sa.func.max(rounds.c.round))
_PENDING = sa.select(orders.c.id, orders.c.time, orders.c.kind).where(orders.c.state == "pending").order_by(orders.c.id)
ORDER = sa.select(orders).where(orders.c.id == sa.bindparam("number"))
_ROUND = sa.select(*(column for column in rounds.c if column is not rounds.c.config))
_ROUNDS, _ROUND_OF = _ROUND.order_by(rounds.c.round), _ROUND.where(rounds.c.round == sa.bindparam("index"))
_LAST_ROUNDS = _ROUND.order_by(rounds.c.round.desc()).limit(sa.bindparam("count", type_=sa.Integer))
_UNFINISHED = _ROUND.where(rounds.c.state == "running")
_CONFIG = sa.select(rounds.c.config).where(rounds.c.round == sa.bindparam("index"))
_METRICS = sa.select(metrics).where(metrics.c.round == sa.bindparam("index")).order_by(metrics.c.name)
_STAGES = sa.select(stages).where(stages.c.round == sa.bindparam("index")).order_by(sa.text("rowid"))
_DRAW_BEFORE = sa.select(draws).where(draws.c.round < sa.bindparam("index")).order_by(draws.c.round.desc()).limit(1)
_EVENTS = sa.select(events).order_by(events.c.id)
_POLICIES = sa.select(policies).order_by(policies.c.version)
_POLICY, _WITH_WEIGHTS = (
    policies.select().where(policies.c.version == sa.bindparam("version")),
    _POLICIES.where(policies.c.weights),
)
RUN, _CREATED = sa.select(runs), sa.select(runs.c.created)


def now() -> str:
    """This moment, as the ledger writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
