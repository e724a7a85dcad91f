"""Hashes of the ledger's rows: SQLite notices a page that is no page, but not a bit that has changed in a value.

Rows that decide are hashed: which run it is, rounds, policies with β and pins, draws, orders, sums, what is kept under names,
and the metrics that a later round or the schedule reads. Triggers of each connection keep the hashes, so each changes in the
transaction of its row. They are temporary: whoever changes a row with another program changes no hash, and is told of it at
the next start.
"""

from __future__ import annotations

import functools
import hashlib
import sqlite3
from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa

from selfplay.storage.schema import DECIDING, draws, metrics, orders, policies, rounds, runs, state, totals

SINCE = {7: (runs, rounds, policies, draws, state), 8: (orders, totals, metrics)}
"""What is hashed, by the version of the ledger that began with it."""
HASHED: dict[str, sa.Table] = {table.name: table for tables in SINCE.values() for table in tables}
ONLY = {
    "metrics": f"{{}}.name IN {DECIDING}",
    "totals": "{}.of != 'events'",
}  # how many events there were decides nothing
"""Which rows of a table are hashed, where that is not all of them."""
BY_ROUND = ("rounds", "draws")
LAST = 64
"""Of these tables, the rounds whose rows are looked at when a run opens."""
READ_FROM = {"metrics": ("NOT INDEXED", "INDEXED BY metrics_by_name")}
"""Where the values of a row are read from, where that is not the table alone: the guard reads metrics from their index."""
BY_INDEX = {"orders": ("id", "state = 'pending'"), "rounds": ("round", "state = 'running'")}
"""What is asked for by an index: a row that is whole is not found where its entry there is damaged."""


class Damaged(NamedTuple):
    """A row that is not what was written."""

    table: str
    key: str
    gone: bool = False

    def __str__(self) -> str:
        return f"the row {self.key} of its table {self.table}{', which is gone' if self.gone else ''}"


def prepare(connection: sqlite3.Connection) -> None:
    """Have a connection keep the hashes, where the ledger has them."""
    connection.create_function("row_hash", -1, _hash, deterministic=True)
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'row_hashes'").fetchone() is None:
        return
    for name in HASHED:
        for event in ("INSERT", "UPDATE"):
            connection.execute(
                f"CREATE TEMP TRIGGER IF NOT EXISTS hash_{name}_{event} AFTER {event} ON main.{name}"
                f" WHEN {_hashed(name, 'NEW')} BEGIN {_keep(name)}; END"
            )
        connection.execute(
            f"CREATE TEMP TRIGGER IF NOT EXISTS hash_{name}_DELETE AFTER DELETE ON main.{name}"
            f" WHEN {_hashed(name, 'OLD')} BEGIN"
            f" DELETE FROM row_hashes WHERE of = '{name}' AND key = {_key(name, 'OLD')}; END"
        )


def begin(connection: sa.Connection, before: int) -> None:
    """Hash the rows that a ledger of the version `before`, or who wrote into it with that version, had no hashes of."""
    if before < 7 and connection.exec_driver_sql("SELECT 1 FROM row_hashes LIMIT 1").scalar() is not None:
        before = 7  # which version it was is damaged: a ledger with hashes has had those
    hash_again(connection, *(table.name for version, tables in SINCE.items() if version > before for table in tables))


def hash_again(connection: sa.Connection, *names: str) -> None:
    """Hash the rows of these tables as they are."""
    for name in names:
        connection.exec_driver_sql(f"DELETE FROM row_hashes WHERE of = '{name}'")
        connection.exec_driver_sql(
            f"INSERT INTO row_hashes SELECT '{name}', {_key(name, name)}, {_of(name, name)} FROM {name} NOT INDEXED"
            f" WHERE {_hashed(name, name)}"
        )


def damaged(connection: sa.Connection, every: bool = False) -> Iterable[Damaged]:
    """Rows that are not what their hashes say: of rounds and draws the newest alone, unless `every` is asked for."""
    for name, asked in _others(every):
        for (key,) in connection.exec_driver_sql(asked):
            yield Damaged(name, key)
    for of, key in connection.exec_driver_sql(_gone()):
        yield Damaged(of, key, gone=True)
    for name, asked in _in_one_alone():
        for (number,) in connection.exec_driver_sql(asked):
            yield Damaged(name, str(number))


@functools.cache
def _others(every: bool) -> list[tuple[str, str]]:
    """For each table what finds the keys of rows that are not what their hashes say, once for each place to read it from."""
    found = []
    for name in HASHED:
        newest = "" if every or name not in BY_ROUND else f" AND round > (SELECT max(round) FROM {name}) - {LAST}"
        for source in READ_FROM.get(name, ("NOT INDEXED",)):
            asked = (
                f"SELECT found.key FROM (SELECT {_key(name, name)} AS key, {_of(name, name)} AS hash FROM {name} {source}"
                f" WHERE {_hashed(name, name)}{newest}) AS found LEFT JOIN row_hashes ON of = '{name}'"
                " AND row_hashes.key = found.key WHERE row_hashes.hash IS NOT found.hash"
            )
            found.append((name, asked))
    return found


@functools.cache
def _gone() -> str:
    """What finds the hashes of rows that are not there."""
    return "SELECT of, key FROM row_hashes WHERE " + " AND ".join(
        f"(of != '{name}' OR key NOT IN (SELECT {_key(name, name)} FROM {name} WHERE {_hashed(name, name)}))"
        for name in HASHED
    )


@functools.cache
def _in_one_alone() -> list[tuple[str, str]]:
    """For each index what finds the rows that it has and its table has not, and those that the table alone has."""
    return [
        (name, f"SELECT {key} FROM {table} WHERE {asked} EXCEPT SELECT {key} FROM {index} WHERE {asked}")
        for name, (key, asked) in BY_INDEX.items()
        for table, index in ((f"{name} NOT INDEXED", name), (name, f"{name} NOT INDEXED"))
    ]


def _key(name: str, row: str) -> str:
    return " || ' ' || ".join(f"CAST({row}.{column.name} AS TEXT)" for column in HASHED[name].primary_key.columns)


def _hashed(name: str, row: str) -> str:
    return ONLY.get(name, "TRUE").format(row)


def _keep(name: str) -> str:
    # Not INSERT OR REPLACE: in a trigger, the conflict clause of the statement that fires it would hold instead.
    values = f"VALUES ('{name}', {_key(name, 'NEW')}, {_of(name, 'NEW')})"
    return f"INSERT INTO row_hashes {values} ON CONFLICT (of, key) DO UPDATE SET hash = excluded.hash"


def _of(name: str, row: str) -> str:
    return f"row_hash({', '.join(f'{row}.{column.name}' for column in HASHED[name].columns)})"


def _hash(*values: Any) -> bytes:
    parts: list[bytes] = []
    for value in values:
        raw = value if isinstance(value, bytes) else repr(value).encode()
        parts += (TYPES[type(value)], b"%d " % len(raw), raw)
    return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


TYPES = {kind: f"{kind.__name__} ".encode() for kind in (str, int, float, bytes, type(None))}
"""What SQLite hands to a function, as a hash names it."""
