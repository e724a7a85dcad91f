"""The ledger of a run folder: SQLite, through SQLAlchemy.

The folders are the truth about what is finished; the ledger tells what happened, in what order, and how it went.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError as LedgerError
from sqlalchemy.exc import OperationalError

from selfplay.errors import InputError, LockLost
from selfplay.storage import folders, hashed_rows, sqlite_files, wal
from selfplay.storage.lock import STATE, RunLock
from selfplay.storage.manifests import require_nothing_made
from selfplay.storage.reader import ORDER, RUN, Reader, now
from selfplay.storage.runner import Runner
from selfplay.storage.schema import (
    COUNTED_AGAIN,
    MIGRATIONS,
    draws,
    events,
    metadata,
    metrics,
    migrate,
    orders,
    pairs,
    policies,
    rounds,
    runs,
    stages,
    state,
)

__all__ = ["RESTARTS", "LedgerError", "PairRow", "Store", "now"]

RESTARTS = ("engine_restart", "swap_restart", "reward_restart", "trainer_restart")
"""Kinds of events that say that a child was started again."""
BUSY = 30.0  # seconds to wait for another process that writes
LONGEST_WAL = 64 << 20  # bytes that the write-ahead log keeps on disk once it was written back
AFTER_SLASH = chr(ord("/") + 1)
"""The names of a stage's metrics, «stage/name», lie between «stage/» and «stage» with this."""
PAIRS_AT_A_TIME = 4096  # rows of pairs that are in memory while a round is indexed


class PairRow(Protocol):
    """What the index holds of a pair."""

    @property
    def prompt_id(self) -> str: ...
    @property
    def explicit_margin(self) -> float: ...
    @property
    def implicit_margin(self) -> float: ...
    @property
    def potential(self) -> float | None: ...
    @property
    def kept_because(self) -> str | None: ...
    @property
    def dropped_because(self) -> str | None: ...


class Store(Reader):
    """Reads and writes the ledger. All times are UTC, ISO 8601.

    Raises LedgerError where it does not answer (locked for long, disk full, damaged); opened, also OSError, and InputError
    for one that cannot be used.
    """

    version = len(MIGRATIONS)
    """Of the tables, and of what is hashed in them."""

    def __init__(self, run_dir: Path, lock: RunLock | None = None) -> None:
        """lock: of the runner, who is registered in the ledger. From then on each transaction asks whether the folder is held
        still, and each that writes whether the ledger knows of no later runner; LockLost where not. Registering raises
        InputError where the folder is a copy of one in which somebody may work.
        """
        path = run_dir / "ledger.sqlite"
        if not path.is_file() or not path.stat().st_size:
            require_nothing_made(run_dir, "is gone")
        if what := wal.damage(Path(f"{path}-wal")):
            hint = "put both files back from a copy; `selfplay doctor` goes on without these transactions"
            raise InputError(f"{path}-wal is damaged: {what}", hint)
        database = sqlite_files.uri(path)
        super().__init__(
            path, sa.create_engine("sqlite://", poolclass=sa.QueuePool, creator=lambda: _connect(database))
        )
        sa.event.listen(self._engine, "connect", lambda connection, _: _prepare(connection, path))
        with folders.disk_errors(path):
            self._migrate(run_dir)
        if lock is not None:
            try:
                self._hash_what_was_not()
                lock.register(self)
            except BaseException:
                self.close()
                raise
            sa.event.listen(self._engine, "begin", lambda _: lock.check())
            # SQLite has errors of its own for a file that was moved.
            sa.event.listen(self._engine, "handle_error", lambda _: lock.check())
            sa.event.listen(self._engine, "commit", lambda connection: _require_ours(connection, lock))

    def _migrate(self, run_dir: Path) -> None:
        # Service, API and command line may open a new ledger at the same moment.
        with _alone(run_dir):
            try:
                with self._engine.begin() as connection:
                    if not sa.inspect(connection).has_table("schema_version"):
                        require_nothing_made(run_dir, "is empty")
                    hashed_rows.begin(connection, migrate(connection, str(self.path)))
                self._engine.dispose()  # a connection that is opened now keeps the hashes of rows
            except OperationalError:
                raise
            except LedgerError as error:
                hint = "restore the run folder from a backup; without one, `selfplay doctor` makes the ledger again from the manifests"
                raise InputError(f"{self.path} is damaged: {error.orig}", hint) from error

    def _hash_what_was_not(self) -> None:
        """Hash what the last runner kept no hashes of: another command may have migrated the ledger while it worked."""
        before = Runner.read(self.state(STATE))
        if before is not None and before.ledger < self.version:
            with self._engine.begin() as connection:
                hashed_rows.begin(connection, before.ledger)

    def open_run(self, name: str, fixed: dict[str, Any], fresh: bool = False) -> None:
        """Record the run, or check that this folder belongs to it. Raises InputError for another policy, split or seed.

        `fresh`: nothing was imported yet, so nothing is fixed; what a failed first start recorded is replaced.
        """
        with self._engine.begin() as connection:
            if fresh:
                connection.execute(runs.delete())
            row = connection.execute(RUN).mappings().first()
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

    def open_round(self, index: int, champion: int, cursor: tuple[int, int], fingerprint: str, config: Any) -> None:
        with self._engine.begin() as connection:
            values = {"round": index, "state": "running", "started": now(), "sampler": champion, "champion": champion}
            values |= {"cursor": list(cursor), "fingerprint": fingerprint, "config": config, "reasons": []}
            connection.execute(_ROUND_OPENED, values)

    def set_sampler(self, index: int, version: int) -> None:
        """Record which policy samples the candidates of a round, where that is not the one that it is trained from."""
        with self._engine.begin() as connection:
            connection.execute(_ROUND_CHANGED, {"index": index, "sampler": version})

    def change_config(self, index: int, fingerprint: str, config: Any) -> None:
        """An unfinished round goes on with another configuration."""
        with self._engine.begin() as connection:
            connection.execute(_ROUND_CHANGED, {"index": index, "fingerprint": fingerprint, "config": config})

    def close_round(self, index: int, state: str, policy: int, reasons: list[str], told: str | None = None) -> None:
        """Record how a round ended. `policy`: the one that serves after it; `told`: an event that says so, at the same moment."""
        with self._engine.begin() as connection:
            values = {"state": state, "ended": now(), "policy": policy, "reasons": reasons}
            connection.execute(_ROUND_CHANGED, {"index": index, **values})
            if told is not None:
                connection.execute(_EVENT_ADDED, {"time": now(), "round": index, "kind": state, "text": told})

    def record_stage(self, index: int, stage: str, seconds: float, values: dict[str, float]) -> None:
        """Record a finished stage with its metrics (names without the stage), once.

        A stage that was done again took other seconds: it replaces what was recorded of it before.
        """
        this = {"index": index, "name": stage}
        with self._engine.begin() as connection:
            known = connection.scalar(_STAGE_SECONDS, this)
            if known == seconds:
                return
            if known is not None:
                connection.execute(_STAGE_DELETED, this)
            connection.execute(_STAGE_ADDED, {"round": index, "stage": stage, "ended": now(), "seconds": seconds})
            self._replace_metrics(connection, index, stage, values)

    def record_draw(self, index: int, epoch: int, size: int, levels: bytes) -> None:
        """Keep how often each prompt was drawn by the end of a round; what was kept of that round before is replaced."""
        with self._engine.begin() as connection:
            connection.execute(_DRAW_DELETED, {"index": index})
            connection.execute(_DRAW_ADDED, {"round": index, "epoch": epoch, "size": size, "levels": levels})

    def record_metrics(self, index: int, stage: str, values: dict[str, float]) -> None:
        """Record the metrics of a stage that did not finish, but whose numbers say why."""
        with self._engine.begin() as connection:
            self._replace_metrics(connection, index, stage, values)

    @staticmethod
    def _replace_metrics(connection: sa.Connection, index: int, stage: str, values: dict[str, float]) -> None:
        connection.execute(_METRICS_DELETED, {"index": index, "first": f"{stage}/", "after": f"{stage}{AFTER_SLASH}"})
        rows = [{"round": index, "name": f"{stage}/{name}", "value": float(value)} for name, value in values.items()]
        if rows:
            connection.execute(_METRICS_ADDED, rows)

    def record_pairs(self, index: int, rows: Iterable[PairRow]) -> None:
        """Index the pairs of a round in one transaction, in place of what was indexed for it before.

        The pairs themselves are in the artifacts. `rows` may be made as they are read: only some thousand are in memory.
        """
        values = (
            (
                index,
                i,
                p.prompt_id,
                p.explicit_margin,
                p.implicit_margin,
                p.potential,
                p.kept_because,
                p.dropped_because,
            )
            for i, p in enumerate(rows)
        )
        with self._engine.begin() as connection:
            connection.execute(_PAIRS_DELETED, {"index": index})
            while batch := list(islice(values, PAIRS_AT_A_TIME)):
                connection.exec_driver_sql("INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", batch)

    def record_policy(self, version: int, state: str, **fields: Any) -> None:
        """Insert a policy, or change the state of one that is there."""
        with self._engine.begin() as connection:
            changed = connection.execute(_POLICY_CHANGED, {"number": version, "state": state, **fields})
            if not changed.rowcount:
                connection.execute(_POLICY_ADDED, {"version": version, "state": state, "weights": True, **fields})

    def weights_deleted(self, versions: list[int]) -> None:
        with self._engine.begin() as connection:
            connection.execute(_POLICY_CHANGED, [{"number": version, "weights": False} for version in versions])

    def count_again(self) -> None:
        """Make the sums anew from the rows, and take the metrics as they are."""
        with self._engine.begin() as connection:
            for statement in COUNTED_AGAIN:
                connection.exec_driver_sql(statement)
            hashed_rows.hash_again(connection, "totals", "metrics")

    def damaged_rows(self, every: bool = False) -> list[hashed_rows.Damaged]:
        """Rows that are not what was written (`storage/hashed_rows.py`)."""
        with self._engine.connect() as connection:
            return list(hashed_rows.damaged(connection, every))

    def insert(self, table: str, values: dict[str, Any]) -> None:
        """Insert a row as it is: for a ledger that is made from a folder."""
        with self._engine.begin() as connection:
            connection.execute(metadata.tables[table].insert().values(**values))

    def delete_events(self, keep: int, most: int) -> None:
        """Delete events but the newest, `most` of them at a time, and orders that were answered before those that stay.

        The sums of events stay as they are.
        """
        with self._engine.begin() as connection:
            newest, oldest = connection.execute(_EVENTS_BETWEEN).one()
            if newest is None or newest - oldest < keep:
                return
            last = min(newest - keep, oldest + most - 1)
            since = connection.scalar(sa.select(events.c.time).where(events.c.id > last).order_by(events.c.id).limit(1))
            connection.execute(events.delete().where(events.c.id <= last))
            connection.execute(orders.delete().where(orders.c.state != "pending", orders.c.ended < since))

    def give_back_pages(self, most: int) -> None:
        """Shorten the ledger's file by up to `most` free pages, where more than a quarter of all are free.

        A ledger that was made by an earlier version cannot: it only fills its free pages again.
        """
        with self._engine.connect() as connection:
            free, total = (
                connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("freelist_count", "page_count")
            )
            if free and total and free > total / 4:
                driver: Any = connection.connection.driver_connection
                driver.executescript(f"PRAGMA incremental_vacuum({most})")  # `execute` would take its first step alone

    def event(self, kind: str, text: str, index: int | None = None) -> None:
        with self._engine.begin() as connection:
            connection.execute(_EVENT_ADDED, {"time": now(), "round": index, "kind": kind, "text": text})

    def submit(self, kind: str, arguments: dict[str, Any], origin: str) -> int:
        """Leave an order for whoever runs this folder, and an event that says so; returns its number."""
        values = {"time": now(), "origin": origin, "kind": kind, "arguments": arguments, "state": "pending"}
        with self._engine.begin() as connection:
            key = connection.execute(_ORDER_ADDED, values).inserted_primary_key
            connection.execute(
                _EVENT_ADDED, {"time": now(), "round": None, "kind": "order_given", "text": _given(values)}
            )
        assert key is not None
        return int(key[0])

    def answer(self, order: int, state: str, result: str) -> None:
        """Record what came of an order: `done` or `refused`, and an event that says so.

        Of prompts to add only their number stays: those that joined are in the pool, and the rest was refused.
        """
        values: dict[str, Any] = {"state": state, "ended": now(), "result": result}
        with self._engine.begin() as connection:
            row = connection.execute(ORDER, {"number": order}).mappings().one()
            if "rows" in row["arguments"]:
                values["arguments"] = {"prompts": len(row["arguments"]["rows"])}
            connection.execute(_ORDER_CHANGED, {"number": order, **values})
            text = f"{_given(dict(row))}: {result}"
            connection.execute(_EVENT_ADDED, {"time": now(), "round": None, "kind": f"order_{state}", "text": text})

    def set_state(self, name: str, value: Any) -> None:
        """Keep a value under a name; what was there is replaced."""
        with self._engine.begin() as connection:
            changed = connection.execute(_STATE_CHANGED, {"kept": name, "new": value})
            if not changed.rowcount:
                connection.execute(_STATE_ADDED, {"name": name, "value": value})

    def pin(self, version: int, pinned: bool) -> None:
        """Have retention keep the weights of a policy, or no longer."""
        with self._engine.begin() as connection:
            connection.execute(_POLICY_CHANGED, {"number": version, "pinned": pinned})


# What is written all the time is built once: to build a statement takes longer than to run it.
_THIS_STAGE = (stages.c.round == sa.bindparam("index")) & (stages.c.stage == sa.bindparam("name"))
_STAGE_SECONDS = sa.select(stages.c.seconds).where(_THIS_STAGE)
_STAGE_DELETED, _STAGE_ADDED = stages.delete().where(_THIS_STAGE), stages.insert()
_STATE_CHANGED = (
    state.update()
    .where(state.c.name == sa.bindparam("kept"))
    .values(value=sa.bindparam("new", type_=state.c.value.type))
)
_STATE_ADDED, _EVENT_ADDED = state.insert(), events.insert()
_EVENTS_BETWEEN = sa.select(sa.func.max(events.c.id), sa.func.min(events.c.id))
_ROUND_OPENED, _ROUND_CHANGED = rounds.insert(), rounds.update().where(rounds.c.round == sa.bindparam("index"))
_DRAW_DELETED, _DRAW_ADDED = draws.delete().where(draws.c.round == sa.bindparam("index")), draws.insert()
_METRICS_DELETED = metrics.delete().where(
    metrics.c.round == sa.bindparam("index"),
    metrics.c.name >= sa.bindparam("first"),
    metrics.c.name < sa.bindparam("after"),
)
_METRICS_ADDED, _PAIRS_DELETED = metrics.insert(), pairs.delete().where(pairs.c.round == sa.bindparam("index"))
_POLICY_CHANGED, _POLICY_ADDED = (
    policies.update().where(policies.c.version == sa.bindparam("number")),
    policies.insert(),
)
_ORDER_CHANGED, _ORDER_ADDED = orders.update().where(orders.c.id == sa.bindparam("number")), orders.insert()


def _given(order: dict[str, Any]) -> str:
    """«rollback version=3 (from api)»; of prompts to add, which may be many, no word."""
    arguments = [f"{name}={value}" for name, value in order["arguments"].items() if name != "rows"]
    return f"{' '.join([order['kind'], *arguments])} (from {order['origin']})"


def _connect(database: str) -> sqlite3.Connection:
    return sqlite3.connect(database, timeout=BUSY, check_same_thread=False, uri=True)


def _prepare(connection: Any, path: Path) -> None:
    if sqlite_files.is_new(path):
        # A new ledger can give back in small steps what retention frees. For one that has tables it is too late.
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    sqlite_files.set_journal(connection, path)
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"PRAGMA journal_size_limit={LONGEST_WAL}")
    hashed_rows.prepare(connection)


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """While one process makes or migrates a ledger. Where the folder is held by a lease, the transaction has to do."""
    if sqlite_files.by_lease(run_dir / "ledger.sqlite"):
        yield
        return
    with (run_dir / ".ledger.lock").open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_ours(connection: sa.Connection, lock: RunLock) -> None:
    """Raise LockLost where a later runner has registered: what this one wrote is rolled back."""
    query = "SELECT json_extract(value, '$.token') FROM state WHERE name = ?"
    token = connection.exec_driver_sql(query, (STATE,)).scalar()
    assert lock.runner is not None, "who writes with a lock is registered"
    if token != lock.runner.token:
        raise LockLost(
            f"{lock.dir} was taken over by another process (token {token}, here {lock.runner.token}): this one stops, and writes "
            "nothing more there",
            "let that one work, or end it and start again: finished stages are kept",
        )
