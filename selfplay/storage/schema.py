"""The tables of the ledger, and the migrations that bring a ledger of an earlier version to them.

The tables `totals` and `trends` hold what would otherwise be counted anew from all rows at each request. Triggers keep them,
so each changes in the transaction of the row that it counts, whoever writes that row.
"""

from __future__ import annotations

from collections.abc import Callable

import sqlalchemy as sa

from selfplay.errors import InputError

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created", sa.String, nullable=False),
    sa.Column("fixed", sa.JSON, nullable=False),  # what cannot change in this folder
)
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("state", sa.String, nullable=False),  # running | promoted | rejected | skipped | cancelled
    sa.Column("started", sa.String, nullable=False),
    sa.Column("ended", sa.String),
    sa.Column("sampler", sa.Integer, nullable=False),  # policy that samples its candidates
    sa.Column("policy", sa.Integer),  # policy that serves after it
    sa.Column("cursor", sa.JSON, nullable=False),  # [epoch, offset] in the prompt pool at its start
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("reasons", sa.JSON, nullable=False),
    sa.Column("champion", sa.Integer),  # policy that serves when it opens: it is trained from, and meets the candidate
    sa.Index("rounds_by_state", "state", "round"),
)
stages = sa.Table(
    "stages",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("stage", sa.String, primary_key=True),
    sa.Column("ended", sa.String, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
)
policies = sa.Table(
    "policies",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("parent", sa.Integer),
    sa.Column("reference", sa.Integer),
    sa.Column("beta", sa.Float),
    sa.Column("state", sa.String, nullable=False),  # initial | candidate | promoted | rejected
    sa.Column("weights", sa.Boolean, nullable=False),  # False once retention deleted them
    sa.Column("pinned", sa.Boolean, nullable=False, server_default=sa.false()),
)
pairs = sa.Table(
    "pairs",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("prompt_id", sa.String, nullable=False, index=True),
    sa.Column("explicit_margin", sa.Float, nullable=False),
    sa.Column("implicit_margin", sa.Float),  # NULL: not a number (dropped as nonfinite)
    sa.Column("potential", sa.Float),
    sa.Column("kept_because", sa.String),
    sa.Column("dropped_because", sa.String),
    sqlite_with_rowid=False,  # a page in the order of the rounds is then one walk through the table
)
for _name in ("explicit_margin", "implicit_margin", "potential"):
    # All that a filter asks of a pair is in the index of each order: a walk along it never leaves it.
    _rest = [
        c for c in ("explicit_margin", "implicit_margin", "potential", "kept_because", "dropped_because") if c != _name
    ]
    sa.Index(f"pairs_by_{_name}", *(pairs.c[c] for c in (_name, "round", "row", *_rest)))
metrics = sa.Table(
    "metrics",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, primary_key=True),  # stage/name
    sa.Column("value", sa.Float, nullable=False),
    sa.Index("metrics_by_name", "name", "round", "value"),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.String, nullable=False),
    sa.Column("round", sa.Integer),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("text", sa.String, nullable=False),
    sa.Index("events_by_kind", "kind", "id"),
    sa.Index("events_by_round", "round", "id"),
)
orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.String, nullable=False),
    sa.Column("origin", sa.String, nullable=False),  # who gave it: cli, api, page, daemon
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("arguments", sa.JSON, nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),  # pending | done | refused
    sa.Column("ended", sa.String),
    sa.Column("result", sa.String),
)
state = sa.Table(
    "state",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.JSON, nullable=False),
)
totals = sa.Table(
    "totals",
    metadata,
    sa.Column("of", sa.String, primary_key=True),  # rounds: how many, by state | events: how many there were, by kind
    sa.Column("name", sa.String, primary_key=True),  # stages: seconds, by stage | tokens: sampled, by metric
    sa.Column("value", sa.Float, nullable=False),
    sqlite_with_rowid=False,
)
trends = sa.Table(
    "trends",
    metadata,
    sa.Column("width", sa.Integer, primary_key=True),  # rounds of a bucket, one of WIDTHS
    sa.Column("bucket", sa.Integer, primary_key=True),  # round // width
    sa.Column("name", sa.String, primary_key=True),  # of a metric; last, so that a round writes few pages
    sa.Column("low", sa.Float, nullable=False),  # the lowest value in the bucket, and its round
    sa.Column("low_round", sa.Integer, nullable=False),
    sa.Column("high", sa.Float, nullable=False),  # the highest
    sa.Column("high_round", sa.Integer, nullable=False),
    sqlite_with_rowid=False,
)
draws = sa.Table(
    "draws",
    metadata,
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),  # the lowest level of the pool after this round
    sa.Column("size", sa.Integer, nullable=False),  # training prompts that have a level
    sa.Column("levels", sa.LargeBinary, nullable=False),  # see prompts/draws.py
)
row_hashes = sa.Table(
    "row_hashes",
    metadata,
    sa.Column("of", sa.String, primary_key=True),  # name of a table
    sa.Column("key", sa.String, primary_key=True),  # of a row in it
    sa.Column("hash", sa.LargeBinary, nullable=False),  # see hashed_rows.py
    sqlite_with_rowid=False,
)
schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, nullable=False))

MEAN_REWARDS = ("score/part_external", "score/reward_mean")
"""Metrics that are the mean of the external reward: the first of them that a round has."""
GOLD = "evaluate/gold_total_champion"
JUDGED = "evaluate/reward"
DECIDING = (*MEAN_REWARDS, GOLD, JUDGED)
"""Metrics that the guard of later rounds or the schedule reads."""
TOKENS = ("generate/tokens", "evolve/tokens", "evaluate/tokens")
"""Metrics of what a round sampled: the ledger keeps their sums over all rounds."""
WIDTHS = tuple(2**power for power in range(1, 11))
"""Rounds in a bucket of `trends`: a chart of any length is drawn from the buckets of one width."""


def migrate(connection: sa.Connection, what: str) -> int:
    """Make the tables, or bring those of an earlier version up to date: all or nothing, and by one process.

    `what`: the ledger's name in messages. Returns the version that it had: 0 for a new one. Raises InputError for a ledger of a
    newer version.
    """
    if _version(connection) == len(MIGRATIONS):
        return len(MIGRATIONS)
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    done = _version(connection)
    if done is not None and done > len(MIGRATIONS):
        raise InputError(f"{what} was written by a newer version of selfplay", "upgrade, or use another run folder")
    if done is None and not sa.inspect(connection).get_table_names():
        _make(connection)
    else:
        for migration in MIGRATIONS[done or 0 :]:
            migration(connection)
    changed = schema_version.insert() if done is None else schema_version.update()
    connection.execute(changed.values(version=len(MIGRATIONS)))
    return done or 0


def _version(connection: sa.Connection) -> int | None:
    has = sa.inspect(connection).has_table("schema_version")
    return connection.scalar(sa.select(schema_version.c.version)) if has else None


def _make(connection: sa.Connection) -> None:
    """What all migrations come to, in an empty ledger: nothing has to be looked for, moved or counted."""
    metadata.create_all(connection, checkfirst=False)
    for statement in _TRIGGERS:
        connection.exec_driver_sql(statement)


def _orders_and_pins(connection: sa.Connection) -> None:
    metadata.create_all(connection)
    if "pinned" not in {column["name"] for column in sa.inspect(connection).get_columns("policies")}:
        connection.execute(sa.text("ALTER TABLE policies ADD COLUMN pinned BOOLEAN NOT NULL DEFAULT 0"))


def _pairs_by_value(connection: sa.Connection) -> None:
    if connection.scalar(sa.text("SELECT 1 FROM sqlite_master WHERE name = 'pairs_by_potential'")):
        return
    connection.execute(sa.text("DROP INDEX ix_pairs_prompt_id"))
    connection.execute(sa.text("ALTER TABLE pairs RENAME TO pairs_before"))
    connection.execute(sa.schema.CreateTable(pairs))
    names = ", ".join(column.name for column in pairs.columns)
    connection.execute(sa.text(f"INSERT INTO pairs ({names}) SELECT {names} FROM pairs_before"))
    connection.execute(sa.text("DROP TABLE pairs_before"))
    for index in pairs.indexes:  # after the rows: sorted once, five times as fast
        index.create(connection)


def _totals_and_trends(connection: sa.Connection) -> None:
    for table in (totals, trends):
        table.create(connection, checkfirst=True)
    for table in (rounds, metrics, events):
        for index in table.indexes:
            index.create(connection, checkfirst=True)
    for statement in (*_TRIGGERS, *_COUNTED):
        connection.exec_driver_sql(statement)


def _draws(connection: sa.Connection) -> None:
    draws.create(connection, checkfirst=True)


def _champions(connection: sa.Connection) -> None:
    if "champion" not in {column["name"] for column in sa.inspect(connection).get_columns("rounds")}:
        connection.execute(sa.text("ALTER TABLE rounds ADD COLUMN champion INTEGER"))
    connection.execute(sa.text("UPDATE rounds SET champion = sampler WHERE champion IS NULL"))


def _row_hashes(connection: sa.Connection) -> None:
    row_hashes.create(connection, checkfirst=True)


def _as_it_is(connection: sa.Connection) -> None:
    """The tables stay; whoever opens the ledger does what is new (`hashed_rows.begin`)."""


MIGRATIONS: list[Callable[[sa.Connection], None]] = [
    metadata.create_all,  # 1: everything above
    _orders_and_pins,  # 2: orders, state, policies.pinned
    _pairs_by_value,  # 3: pairs in the order of each of their values
    _totals_and_trends,  # 4: sums and charts that need no walk over all rounds; indexes by state, name, kind and round
    _draws,  # 5: what was drawn of the pool
    _champions,  # 6: rounds.champion, which another policy may sample for
    _row_hashes,  # 7: hashes of the rows that decide
    _as_it_is,  # 8: hashes of orders, sums, and metrics that decide
]


def _add(what: str, name: str, value: str) -> str:
    """SQL that adds to a total, in a trigger."""
    return (
        f"INSERT INTO totals VALUES ('{what}', {name}, {value})"
        " ON CONFLICT (of, name) DO UPDATE SET value = value + excluded.value;"
    )


_NAMES = ", ".join(f"'{name}'" for name in TOKENS)
_EACH_WIDTH = f"(SELECT column1 AS width FROM (VALUES {', '.join(f'({width})' for width in WIDTHS)}))"
_FINITE = "abs({}.value) < 1e999"  # a chart shows no other value
_INTO_TRENDS = (
    "INSERT INTO trends (width, bucket, name, low, low_round, high, high_round) SELECT width, {0}.round / width, {0}.name,"
    " {0}.value, {0}.round, {0}.value, {0}.round FROM "
)
_WIDEN = (
    " ON CONFLICT (width, bucket, name) DO UPDATE SET low = min(low, excluded.low), high = max(high, excluded.high),"
    " low_round = CASE WHEN excluded.low < low THEN excluded.low_round ELSE low_round END,"
    " high_round = CASE WHEN excluded.high > high THEN excluded.high_round ELSE high_round END"
)
_TRIGGERS = (
    f"CREATE TRIGGER IF NOT EXISTS rounds_opened AFTER INSERT ON rounds BEGIN {_add('rounds', 'NEW.state', '1')} END",
    f"CREATE TRIGGER IF NOT EXISTS rounds_changed AFTER UPDATE OF state ON rounds BEGIN {_add('rounds', 'OLD.state', '-1')}"
    f" {_add('rounds', 'NEW.state', '1')} END",
    # What retention deletes has happened all the same: there is no trigger for it.
    f"CREATE TRIGGER IF NOT EXISTS events_added AFTER INSERT ON events BEGIN {_add('events', 'NEW.kind', '1')} END",
    f"CREATE TRIGGER IF NOT EXISTS stages_added AFTER INSERT ON stages BEGIN {_add('stages', 'NEW.stage', 'NEW.seconds')} END",
    f"CREATE TRIGGER IF NOT EXISTS stages_deleted AFTER DELETE ON stages BEGIN {_add('stages', 'OLD.stage', '-OLD.seconds')} END",
    f"CREATE TRIGGER IF NOT EXISTS tokens_added AFTER INSERT ON metrics WHEN NEW.name IN ({_NAMES})"
    f" BEGIN {_add('tokens', 'NEW.name', 'NEW.value')} END",
    f"CREATE TRIGGER IF NOT EXISTS tokens_deleted AFTER DELETE ON metrics WHEN OLD.name IN ({_NAMES})"
    f" BEGIN {_add('tokens', 'OLD.name', '-OLD.value')} END",
    f"CREATE TRIGGER IF NOT EXISTS trends_added AFTER INSERT ON metrics WHEN {_FINITE.format('NEW')}"
    f" BEGIN {_INTO_TRENDS.format('NEW')} {_EACH_WIDTH} WHERE TRUE {_WIDEN}; END",
    # A value that is taken back may have been the highest: its buckets are made anew, from their other rounds.
    "CREATE TRIGGER IF NOT EXISTS trends_deleted AFTER DELETE ON metrics BEGIN"
    f" DELETE FROM trends WHERE name = OLD.name AND (width, bucket) IN (SELECT width, OLD.round / width FROM {_EACH_WIDTH});"
    f" {_INTO_TRENDS.format('metrics')} {_EACH_WIDTH} CROSS JOIN metrics WHERE name = OLD.name AND {_FINITE.format('metrics')}"
    f" AND round BETWEEN OLD.round / width * width AND OLD.round / width * width + width - 1 {_WIDEN}; END",
)
COUNTED_AGAIN = (
    "DELETE FROM totals WHERE of != 'events'",
    "INSERT INTO totals SELECT 'rounds', state, count(*) FROM rounds GROUP BY state",
    "INSERT INTO totals SELECT 'stages', stage, sum(seconds) FROM stages GROUP BY stage",
    f"INSERT INTO totals SELECT 'tokens', name, sum(value) FROM metrics WHERE name IN ({_NAMES}) GROUP BY name",
)
"""The sums, counted from the rows. Those of events stay: retention deletes rows of events."""
_COUNTED = (
    *COUNTED_AGAIN,
    "DELETE FROM totals WHERE of = 'events'",
    "INSERT INTO totals SELECT 'events', kind, count(*) FROM events GROUP BY kind",
    "DELETE FROM trends",
    f"{_INTO_TRENDS.format('metrics')} {_EACH_WIDTH} CROSS JOIN metrics WHERE {_FINITE.format('metrics')} {_WIDEN}",
)
