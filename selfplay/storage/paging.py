"""Bounded reads of the ledger, for the API, the page and the metrics. What they cost does not grow with the run.

A long list comes in pages. A cursor names the last row of a page, so the next page starts there however deep it lies.
"""

from __future__ import annotations

import base64
import json
import math
import operator
from dataclasses import dataclass
from typing import Any, Literal

from selfplay.errors import InputError
from selfplay.storage.ledger import Store

Sort = Literal["round", "explicit_margin", "implicit_margin", "potential"]
MARGINS = ("explicit_margin", "implicit_margin", "potential")
# The prompt comes by a look-up of its own: all else is in the index of the order, which the walk then never leaves.
PAIR = (
    "round, row, (SELECT prompt_id FROM pairs AS whole WHERE whole.round = pairs.round AND whole.row = pairs.row) AS prompt_id,"
    " explicit_margin, implicit_margin, potential, kept_because, dropped_because"
)
EXAMINED = 50_000  # pairs that one page looks at, at most, for those that a filter lets through


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFilter:
    """Which pairs; None asks nothing. Both ends of a range belong to it."""

    round: int | None = None
    kept: bool | None = None
    reason: str | None = None  # why kept or why dropped
    prompt_id: str | None = None
    explicit_margin: tuple[float | None, float | None] = (None, None)
    implicit_margin: tuple[float | None, float | None] = (None, None)
    potential: tuple[float | None, float | None] = (None, None)


class CursorError(InputError):
    """A cursor that no page gave."""


@dataclass(frozen=True, slots=True)
class Page:
    rows: list[dict[str, Any]]
    next: str | None  # cursor of the next page; None at the end


Position = tuple[float | None, int, int]  # (value that is sorted by, round, row) of a pair


def pairs(
    store: Store, where: PairFilter, sort: Sort = "round", descending: bool = True, after: str | None = None, limit: int = 50
) -> Page:  # fmt: skip
    """A page of the index of pairs, at most `limit` rows, in the order of (sort, round, row); those without a value last.

    A page may hold fewer rows than `limit`, none even, before the end: over all rounds it examines at most EXAMINED
    pairs, so that a filter which hardly anything passes takes several short reads, not one long. Raises CursorError.
    """
    position = None if after is None else _decode(after)
    rows: list[dict[str, Any]] = []
    nullable = sort in ("implicit_margin", "potential") and getattr(where, sort) == (None, None)
    for valued in (True, False) if nullable else (True,):
        if position is not None and valued != (position[0] is not None):
            continue  # the cursor is in the other part
        found, end = _walk(store, where, sort, valued, descending, position, limit - len(rows))
        rows, position = rows + found, None
        if end is None and valued and nullable and len(rows) == limit:
            end = (None, 2**62 if descending else -1, 0)  # where the part without values begins
        if end is not None:
            return Page(rows, _encode(end))
    return Page(rows, None)


def _walk(
    store: Store, where: PairFilter, sort: Sort, valued: bool, descending: bool, position: Position | None, limit: int
) -> tuple[list[dict[str, Any]], Position | None]:  # fmt: skip
    """Rows of the part of an order that has a value, or of the part that has none; and where to go on, if anywhere.

    The walk along the index has one bound at each end: a second one of the same side could take the place of the first
    in SQLite's plan.
    """
    names = [sort, "round", "row"] if valued and sort != "round" else ["round", "row"]
    down, ahead = (" DESC", "<") if descending else ("", ">")
    order, columns = ", ".join(f"{name}{down}" for name in names), f"({', '.join(names)})"
    narrow, loose, values = _conditions(where, sort)

    def bound(sign: str, mark: str, key: Position) -> str:
        values.update({f"{mark}_{name}": value for name, value in zip((sort, "round", "row"), key, strict=True)})
        return f"{columns} {sign} ({', '.join(f':{mark}_{name}' for name in names)})"

    begin, finish = [], []
    if not valued:
        narrow.append(f"{sort} IS NULL")
    elif sort != "round":
        low, high = getattr(where, sort)
        values |= {"low": -math.inf if low is None else low, "high": high}
        begin, finish = [f"{sort} >= :low"], [] if high is None else [f"{sort} <= :high"]
        if descending:
            begin, finish = finish, begin
    if position is not None:
        begin = [bound(ahead, "after", position)]
    end: Position | None = None
    if loose and where.round is None and where.prompt_id is None:
        # The row that the walk ends at is found first, by counting alone.
        last = store.query(
            f"SELECT {sort} AS key, round, row FROM pairs WHERE {' AND '.join([*begin, *finish, *narrow]) or 'TRUE'}"
            f" ORDER BY {order} LIMIT 1 OFFSET :skipped",
            **values, skipped=EXAMINED - 1,
        )  # fmt: skip
        if last:
            end = (last[0]["key"], last[0]["round"], last[0]["row"])
            finish = [bound(">=" if descending else "<=", "upto", end)]
    rows = store.query(
        f"SELECT {PAIR} FROM pairs WHERE {' AND '.join([*begin, *finish, *narrow, *loose]) or 'TRUE'}"
        f" ORDER BY {order} LIMIT :limit",
        **values, limit=limit + 1,
    )  # fmt: skip
    if len(rows) > limit:
        kept = rows[limit - 1]
        end = (kept[sort], kept["round"], kept["row"])
    return rows[:limit], end


def _conditions(where: PairFilter, sort: Sort) -> tuple[list[str], list[str], dict[str, Any]]:
    """SQL of a filter: what an index narrows down to few pairs, all else but the range of `sort`; and the values.

    The unary plus keeps SQLite from taking the index of a loose condition and sorting all that it finds there.
    """
    values: dict[str, Any] = {"prompt_id": where.prompt_id, "round": where.round, "reason": where.reason}
    narrow = [] if where.prompt_id is None else ["prompt_id = :prompt_id"]
    if where.round is not None:
        narrow.append("+round = :round" if narrow else "round = :round")
    loose = [] if where.kept is None else [f"kept_because IS {'NOT ' if where.kept else ''}NULL"]
    if where.reason is not None:
        loose.append(":reason IN (kept_because, dropped_because)")
    for name in MARGINS:
        for value, sign, mark in zip(getattr(where, name), (">=", "<="), ("from", "to"), strict=True):
            if value is not None and name != sort:
                loose.append(f"+{name} {sign} :{mark}_{name}")
                values[f"{mark}_{name}"] = value
    return narrow, loose, values


def _encode(key: Position) -> str:
    return base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")


def _decode(cursor: str) -> Position:
    try:
        value, *rest = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True))
        index, row = (operator.index(number) for number in rest)
        if max(abs(index), abs(row)) < 2**63:
            return None if value is None else float(value), index, row
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise CursorError("the cursor is not one that a page gave", "ask for the first page")


def histogram(store: Store, index: int, column: str, bins: int = 30) -> tuple[list[float], list[int], list[int]]:
    """Base pairs of a round by a margin or the potential: edges (bins + 1,), kept (bins,), dropped (bins,).

    Without a finite value all three are empty; where all values are equal there is one bin of width 0.
    """
    assert column in MARGINS
    finite = f"round = :round AND abs({column}) < 1e999"
    (ends,) = store.query(f"SELECT min({column}) AS low, max({column}) AS high FROM pairs WHERE {finite}", round=index)
    low, high = ends["low"], ends["high"]
    if low is None:
        return [], [], []
    if high == low:
        bins = 1
    width = (high - low) / bins
    counts = ([0] * bins, [0] * bins)
    for row in store.query(
        f"SELECT min(CAST(coalesce(({column} - :low) / nullif(:width, 0), 0) AS INTEGER), :last) AS bin,"
        f" kept_because IS NULL AS dropped, count(*) AS n FROM pairs WHERE {finite} GROUP BY 1, 2",
        round=index, low=low, width=width, last=bins - 1,
    ):  # fmt: skip
        counts[row["dropped"]][row["bin"]] += row["n"]
    return [low + width * i for i in range(bins)] + [high], *counts


def reasons(store: Store, index: int) -> dict[str, int]:
    """How many base pairs of a round were kept or dropped, by reason."""
    rows = store.query(
        "SELECT coalesce(kept_because, dropped_because) AS reason, count(*) AS n FROM pairs WHERE round = :round"
        " GROUP BY 1 ORDER BY 2 DESC",
        round=index,
    )
    return {row["reason"]: row["n"] for row in rows if row["reason"] is not None}


def standing(store: Store, index: int, row: int) -> dict[str, Any]:
    """Where a pair stands in its round by potential: rank (1 is the highest) of how many, and the lowest that was kept."""
    (found,) = store.query(
        "SELECT count(potential) AS of, sum(potential > (SELECT potential FROM pairs WHERE round = :round AND row = :row)) + 1"
        " AS rank, min(CASE WHEN kept_because IS NOT NULL THEN potential END) AS lowest_kept FROM pairs WHERE round = :round",
        round=index, row=row,
    )  # fmt: skip
    return found


def rounds(store: Store, before: int | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """Rounds, newest first, without their configuration; `seconds` is the sum of their stages."""
    rows = store.query(
        "SELECT round, state, started, ended, sampler, policy, reasons, coalesce((SELECT sum(seconds) FROM stages"
        " WHERE stages.round = rounds.round), 0) AS seconds FROM rounds WHERE round < :before ORDER BY round DESC LIMIT :limit",
        before=2**62 if before is None else before, limit=limit,
    )  # fmt: skip
    return [row | {"reasons": json.loads(row["reasons"])} for row in rows]


def round_(store: Store, index: int) -> dict[str, Any] | None:
    """One round with its configuration, or None."""
    rows = store.query("SELECT * FROM rounds WHERE round = :round", round=index)
    decoded = {name: json.loads(rows[0][name]) for name in ("reasons", "config", "cursor")} if rows else {}
    return rows[0] | decoded if rows else None


def stages(store: Store, index: int) -> list[dict[str, Any]]:
    """The finished stages of a round, in the order they ended."""
    return store.query("SELECT stage, ended, seconds FROM stages WHERE round = :round ORDER BY rowid", round=index)


def waiting_orders(store: Store) -> int:
    """How many orders wait."""
    return int(store.query("SELECT count(*) AS n FROM orders WHERE state = 'pending'")[0]["n"])


def policies(store: Store, before: int | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """Policies, newest first."""
    rows = store.query(
        "SELECT * FROM policies WHERE version < :before ORDER BY version DESC LIMIT :limit",
        before=2**62 if before is None else before, limit=limit,
    )  # fmt: skip
    return [row | {"weights": bool(row["weights"]), "pinned": bool(row["pinned"])} for row in rows]


def events(
    store: Store, before: int | None = None, kind: str | None = None, index: int | None = None, limit: int = 50
) -> list[dict[str, Any]]:
    """Events, newest first; only those of a kind or a round if one is given."""
    values = {"before": 2**62 if before is None else before, "kind": kind, "round": index, "limit": limit}
    where = (
        "id < :before" + (" AND kind = :kind" if kind else "") + (" AND round = :round" if index is not None else "")
    )
    return store.query(
        f"SELECT id, time, round, kind, text FROM events WHERE {where} ORDER BY id DESC LIMIT :limit", **values
    )


def events_after(store: Store, last: int, limit: int = 200) -> list[dict[str, Any]]:
    """The events that follow event number `last`, oldest first."""
    return store.query(
        "SELECT id, time, round, kind, text FROM events WHERE id > :last ORDER BY id LIMIT :limit",
        last=last,
        limit=limit,
    )


def last_event(store: Store) -> int:
    """Number of the newest event; 0 before there is one."""
    return int(store.query("SELECT coalesce(max(id), 0) AS id FROM events")[0]["id"])


def orders(store: Store, before: int | None = None, state: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """Orders, newest first. Of prompts to add only their number is told, which is all that is kept once they are answered."""
    rows = store.query(
        "SELECT id, time, origin, kind, state, ended, result, CASE WHEN json_type(arguments, '$.rows') = 'array' THEN"
        " json_object('prompts', json_array_length(arguments, '$.rows')) ELSE arguments END AS arguments FROM orders"
        " WHERE id < :before"
        + (" AND state = :state" if state else "") + " ORDER BY id DESC LIMIT :limit",
        before=2**62 if before is None else before, state=state, limit=limit,
    )  # fmt: skip
    return [row | {"arguments": json.loads(row["arguments"])} for row in rows]
