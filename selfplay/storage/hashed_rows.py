"""Hashes of the ledger's rows: SQLite notices a page that is no page, but not a bit that has changed in a value.

Rows that decide are hashed: which run it is, rounds, policies with β and pins, draws, orders, sums, what is kept under names,
and the metrics that a later round or the schedule reads. Triggers of each connection keep the hashes, so each changes in the
transaction of its row. They are temporary: whoever changes a row with another program changes no hash, and is told of it at
the next start.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa

from selfplay.storage.schema import DECIDING, draws, metrics, orders, policies, rounds, runs, state, totals

SINCE = {7: (runs, rounds, policies, draws, state), 8: (orders, totals, metrics)}
"""What is hashed, by the version of the ledger that began with it."""
HASHED: dict[str, sa.Table] = {table.name: table for tables in SINCE.values() for table in tables}
ONLY = {"metrics": f"{{}}.name IN {DECIDING}"}
"""Which rows of a table are hashed, where that is not all of them."""
BY_ROUND = ("rounds", "draws", "metrics")
LAST = 64
"""Rounds whose rows are looked at when a run opens."""


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
            f"CREATE TEMP TRIGGER IF NOT EXISTS hash_{name}_DELETE AFTER DELETE ON main.{name} BEGIN"
            f" DELETE FROM row_hashes WHERE of = '{name}' AND key = {_key(name, 'OLD')}; END"
        )


def begin(connection: sa.Connection, before: int) -> None:
    """Hash the rows that a ledger of the version `before` had no hashes of, as they are."""
    for name in (table.name for version, tables in SINCE.items() if version > before for table in tables):
        connection.exec_driver_sql(
            f"INSERT OR REPLACE INTO row_hashes SELECT '{name}', {_key(name, name)}, {_of(name, name)} FROM {name}"
            f" WHERE {_hashed(name, name)}"
        )


def damaged(connection: sa.Connection, every: bool = False) -> Iterable[str]:
    """Rows that are not what their hashes say, in words: of rounds and draws the newest alone, unless `every` is asked for."""
    for name in HASHED:
        newest = "" if every or name not in BY_ROUND else f" AND round > (SELECT max(round) FROM {name}) - {LAST}"
        rows = connection.exec_driver_sql(
            f"SELECT found.key FROM (SELECT {_key(name, name)} AS key, {_of(name, name)} AS hash FROM {name}"
            f" WHERE {_hashed(name, name)}{newest}) AS found"
            f" LEFT JOIN row_hashes ON of = '{name}' AND row_hashes.key = found.key WHERE row_hashes.hash IS NOT found.hash"
        )
        for (key,) in rows:
            yield f"the row {key} of its table {name}"
    gone = connection.exec_driver_sql(
        "SELECT of, key FROM row_hashes WHERE "
        + " AND ".join(
            f"(of != '{name}' OR key NOT IN (SELECT {_key(name, name)} FROM {name} WHERE {_hashed(name, name)}))"
            for name in HASHED
        )
    )
    for of, key in gone:
        yield f"the row {key} of its table {of}, which is gone"


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
