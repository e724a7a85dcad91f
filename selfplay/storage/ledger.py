"""The ledger of a run folder (SQLite through SQLAlchemy), and the lock that makes its holder the only runner.

The folders are the truth about what is finished; the ledger tells what happened, in what order, and how it went.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError as LedgerError
from sqlalchemy.exc import OperationalError

from selfplay.errors import InputError
from selfplay.types import Pair

__all__ = ["RESTARTS", "LedgerError", "RunLock", "Store", "now"]

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
    sa.Column("sampler", sa.Integer, nullable=False),  # policy that samples it
    sa.Column("policy", sa.Integer),  # policy that serves after it
    sa.Column("cursor", sa.JSON, nullable=False),  # [epoch, offset] in the prompt pool at its start
    sa.Column("fingerprint", sa.String, nullable=False),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("reasons", sa.JSON, nullable=False),
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
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("time", sa.String, nullable=False),
    sa.Column("round", sa.Integer),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("text", sa.String, nullable=False),
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
schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, nullable=False))


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


MIGRATIONS: list[Callable[[sa.Connection], None]] = [
    metadata.create_all,  # 1: everything above
    _orders_and_pins,  # 2: orders, state, policies.pinned
    _pairs_by_value,  # 3: pairs in the order of each of their values
]


RESTARTS = ("engine_restart", "swap_restart", "reward_restart", "trainer_restart")
"""Kinds of events that say that a child was started again."""
BUSY = 30.0  # seconds to wait for another process that writes


class Store:
    """Reads and writes the ledger. All times are UTC, ISO 8601.

    Raises LedgerError where it does not answer (locked for long, disk full, damaged); opened, also OSError, and InputError
    for one that cannot be used.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "ledger.sqlite"
        self._engine = sa.create_engine(f"sqlite:///{self.path}", connect_args={"timeout": BUSY})
        sa.event.listen(self._engine, "connect", _wal)
        # Service, API and command line may open a new ledger at the same moment.
        with (run_dir / ".ledger.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                with self._engine.begin() as connection:
                    self._migrate(connection)
            except OperationalError:
                raise
            except LedgerError as error:
                hint = "restore the run folder from a backup"
                raise InputError(f"{self.path} is damaged: {error.orig}", hint) from error

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self, connection: sa.Connection) -> None:
        if self._version(connection) == len(MIGRATIONS):
            return
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # all or nothing, and by one process
        done = self._version(connection)
        if done is not None and done > len(MIGRATIONS):
            raise InputError(
                f"{self.path} was written by a newer version of selfplay", "upgrade, or use another run folder"
            )
        for migrate in MIGRATIONS[done or 0 :]:
            migrate(connection)
        if done is None:
            connection.execute(schema_version.insert().values(version=len(MIGRATIONS)))
        else:
            connection.execute(schema_version.update().values(version=len(MIGRATIONS)))

    @staticmethod
    def _version(connection: sa.Connection) -> int | None:
        has = sa.inspect(connection).has_table("schema_version")
        return connection.scalar(sa.select(schema_version.c.version)) if has else None

    # writing

    def open_run(self, name: str, fixed: dict[str, Any], fresh: bool = False) -> None:
        """Record the run, or check that this folder belongs to it. Raises InputError for another policy, split or seed.

        `fresh`: nothing was imported yet, so nothing is fixed; what a failed first start recorded is replaced.
        """
        with self._engine.begin() as connection:
            if fresh:
                connection.execute(runs.delete())
            row = connection.execute(sa.select(runs)).mappings().first()
            if row is None:
                connection.execute(runs.insert().values(name=name, created=now(), fixed=fixed))
                return
        different = [
            f"{k} ({row['fixed'].get(k)!r} there, {v!r} here)" for k, v in fixed.items() if row["fixed"].get(k) != v
        ]
        if different:
            raise InputError(
                f"{self.path.parent} is a folder made by another config: {', '.join(different)} cannot change within a run",
                "use the values of the run, or another folder (--run-dir, or run.name)",
            )

    def open_round(self, index: int, sampler: int, cursor: tuple[int, int], fingerprint: str, config: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(
                rounds.insert().values(
                    round=index,
                    state="running",
                    started=now(),
                    sampler=sampler,
                    cursor=list(cursor),
                    fingerprint=fingerprint,
                    config=config,
                    reasons=[],
                )
            )

    def change_config(self, index: int, fingerprint: str, config: Any) -> None:
        """An unfinished round goes on with another configuration."""
        with self._engine.begin() as connection:
            connection.execute(
                rounds.update().where(rounds.c.round == index).values(fingerprint=fingerprint, config=config)
            )

    def close_round(self, index: int, state: str, policy: int, reasons: list[str]) -> None:
        with self._engine.begin() as connection:
            connection.execute(
                rounds.update()
                .where(rounds.c.round == index)
                .values(state=state, ended=now(), policy=policy, reasons=reasons)
            )

    def record_stage(self, index: int, stage: str, seconds: float, values: dict[str, float]) -> None:
        """Record a finished stage with its metrics (names without the stage), once.

        A stage that was done again took other seconds: it replaces what was recorded of it before.
        """
        this = (stages.c.round == index) & (stages.c.stage == stage)
        with self._engine.begin() as connection:
            if connection.scalar(sa.select(stages.c.seconds).where(this)) == seconds:
                return
            connection.execute(stages.delete().where(this))
            connection.execute(stages.insert().values(round=index, stage=stage, ended=now(), seconds=seconds))
            self._replace_metrics(connection, index, stage, values)

    def record_metrics(self, index: int, stage: str, values: dict[str, float]) -> None:
        """Record the metrics of a stage that did not finish, but whose numbers say why."""
        with self._engine.begin() as connection:
            self._replace_metrics(connection, index, stage, values)

    @staticmethod
    def _replace_metrics(connection: sa.Connection, index: int, stage: str, values: dict[str, float]) -> None:
        connection.execute(
            metrics.delete().where(metrics.c.round == index, metrics.c.name.startswith(f"{stage}/", autoescape=True))
        )
        rows = [{"round": index, "name": f"{stage}/{name}", "value": float(value)} for name, value in values.items()]
        if rows:
            connection.execute(metrics.insert(), rows)

    def record_pairs(self, index: int, rows: Iterable[Pair]) -> None:
        """Index a round's pairs; the pairs themselves are in the artifacts. Replaces what was indexed for the round."""
        values = [
            {
                "round": index,
                "row": i,
                "prompt_id": p.prompt_id,
                "explicit_margin": p.explicit_margin,
                "implicit_margin": p.implicit_margin,
                "potential": p.potential,
                "kept_because": p.kept_because,
                "dropped_because": p.dropped_because,
            }
            for i, p in enumerate(rows)
        ]
        with self._engine.begin() as connection:
            connection.execute(pairs.delete().where(pairs.c.round == index))
            if values:
                connection.execute(pairs.insert(), values)

    def record_policy(self, version: int, state: str, **fields: Any) -> None:
        """Insert a policy, or change the state of one that is there."""
        with self._engine.begin() as connection:
            changed = connection.execute(
                policies.update().where(policies.c.version == version).values(state=state, **fields)
            )
            if not changed.rowcount:
                connection.execute(policies.insert().values(version=version, state=state, weights=True, **fields))

    def weights_deleted(self, versions: list[int]) -> None:
        with self._engine.begin() as connection:
            connection.execute(policies.update().where(policies.c.version.in_(versions)).values(weights=False))

    def event(self, kind: str, text: str, index: int | None = None) -> None:
        with self._engine.begin() as connection:
            connection.execute(events.insert().values(time=now(), round=index, kind=kind, text=text))

    def submit(self, kind: str, arguments: dict[str, Any], origin: str) -> int:
        """Leave an order for whoever runs this folder, and an event that says so; returns its number."""
        values = {"time": now(), "origin": origin, "kind": kind, "arguments": arguments, "state": "pending"}
        with self._engine.begin() as connection:
            key = connection.execute(orders.insert().values(**values)).inserted_primary_key
            connection.execute(events.insert().values(time=now(), kind="order_given", text=_given(values)))
        assert key is not None
        return int(key[0])

    def answer(self, order: int, state: str, result: str) -> None:
        """Record what came of an order: `done` or `refused`, and an event that says so."""
        with self._engine.begin() as connection:
            connection.execute(
                orders.update().where(orders.c.id == order).values(state=state, ended=now(), result=result)
            )
            row = connection.execute(sa.select(orders).where(orders.c.id == order)).mappings().one()
            text = f"{_given(dict(row))}: {result}"
            connection.execute(events.insert().values(time=now(), kind=f"order_{state}", text=text))

    def set_state(self, name: str, value: Any) -> None:
        """Keep a value under a name; what was there is replaced."""
        with self._engine.begin() as connection:
            changed = connection.execute(state.update().where(state.c.name == name).values(value=value))
            if not changed.rowcount:
                connection.execute(state.insert().values(name=name, value=value))

    def pin(self, version: int, pinned: bool) -> None:
        with self._engine.begin() as connection:
            connection.execute(policies.update().where(policies.c.version == version).values(pinned=pinned))

    # reading

    def query(self, text: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a SELECT with `:name` for values (`paging`); JSON columns come as text."""
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(sa.text(text), values).mappings()]

    def pending(self, kinds: Iterable[str] = ()) -> list[dict[str, Any]]:
        """Number, time and kind of the orders that wait, oldest first; only those of some kinds if any are given."""
        kinds = list(kinds)
        query = sa.select(orders.c.id, orders.c.time, orders.c.kind).where(orders.c.state == "pending")
        return self._rows((query.where(orders.c.kind.in_(kinds)) if kinds else query).order_by(orders.c.id))

    def order(self, number: int) -> dict[str, Any]:
        """One order."""
        return self._rows(sa.select(orders).where(orders.c.id == number))[0]

    def state(self, name: str, default: Any = None) -> Any:
        """What was kept under a name."""
        with self._engine.connect() as connection:
            found = connection.scalar(sa.select(state.c.value).where(state.c.name == name))
        return default if found is None else found

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def rounds(self) -> list[dict[str, Any]]:
        """All rounds, oldest first, without their configurations."""
        columns = [column for column in rounds.c if column is not rounds.c.config]
        return self._rows(sa.select(*columns).order_by(rounds.c.round))

    def round(self, index: int) -> dict[str, Any]:
        """One of them."""
        columns = [column for column in rounds.c if column is not rounds.c.config]
        return self._rows(sa.select(*columns).where(rounds.c.round == index))[0]

    def last_round(self) -> int:
        """Number of the last round that was opened; 0 before there is one."""
        with self._engine.connect() as connection:
            return int(connection.scalar(sa.select(sa.func.max(rounds.c.round))) or 0)

    def config(self, index: int) -> dict[str, Any]:
        """The configuration that a round was last run with."""
        with self._engine.connect() as connection:
            found = connection.scalar(sa.select(rounds.c.config).where(rounds.c.round == index))
        return found if isinstance(found, dict) else {}

    def unfinished(self) -> dict[str, Any] | None:
        rows = self._rows(sa.select(rounds).where(rounds.c.state == "running"))
        return rows[0] if rows else None

    def metrics(self, index: int) -> dict[str, float]:
        rows = self._rows(sa.select(metrics).where(metrics.c.round == index).order_by(metrics.c.name))
        return {row["name"]: row["value"] for row in rows}

    def metrics_by_round(self, names: Iterable[str]) -> dict[int, dict[str, float]]:
        """Some metrics of all rounds that have them."""
        found: dict[int, dict[str, float]] = {}
        for row in self._rows(sa.select(metrics).where(metrics.c.name.in_(list(names))).order_by(metrics.c.round)):
            found.setdefault(row["round"], {})[row["name"]] = row["value"]
        return found

    def spent(self) -> float:
        """Seconds in finished stages, over all rounds."""
        with self._engine.connect() as connection:
            return float(connection.scalar(sa.select(sa.func.sum(stages.c.seconds))) or 0.0)

    def created(self) -> str:
        """When the run was first opened."""
        with self._engine.connect() as connection:
            return str(connection.scalar(sa.select(runs.c.created)) or now())

    def seconds(self, index: int) -> dict[str, float]:
        """Seconds of each finished stage of a round, in the order they ended."""
        rows = self._rows(sa.select(stages).where(stages.c.round == index).order_by(sa.text("rowid")))
        return {row["stage"]: row["seconds"] for row in rows}

    def policies(self) -> list[dict[str, Any]]:
        return self._rows(sa.select(policies).order_by(policies.c.version))

    def events(self, index: int | None = None) -> list[dict[str, Any]]:
        query = sa.select(events).order_by(events.c.id)
        return self._rows(query if index is None else query.where(events.c.round == index))


def _given(order: dict[str, Any]) -> str:
    """«rollback version=3 (from api)»; of prompts to add, which may be many, no word."""
    arguments = [f"{name}={value}" for name, value in order["arguments"].items() if name != "rows"]
    return f"{' '.join([order['kind'], *arguments])} (from {order['origin']})"


def _wal(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class RunLock:
    """The right to run in a folder, held by one process at a time; the kernel releases it however that process ends.

    Makes the folder. Raises InputError where that cannot be, or another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ".lock"
        self._file: Any = None

    def __enter__(self) -> RunLock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{self._path.parent} cannot be a run folder: {error}", "choose another one (--run-dir)"
            ) from None
        self._file = self._path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            text = self._file.read()
            self._file.close()
            try:
                holder = json.loads(text)
                who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
            except (ValueError, KeyError):
                who = "another process"
            raise InputError(
                f"{self._path.parent} is in use by {who}", "wait for it or end it; another run needs another folder"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        json.dump(
            {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, self._file
        )
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
