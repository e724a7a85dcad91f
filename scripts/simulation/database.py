"""The boundary to the ledger: SQLite in memory, one connection for all, each transaction a moment.

A killed process leaves what it has committed, and a connection that rolls back. The statements are those of the product:
SQLAlchemy compiles each once, and then they go to SQLite directly, which takes a third of the time.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.pool import StaticPool

from selfplay.storage import hashed_rows, ledger, reader
from selfplay.storage.ledger import Store
from selfplay.storage.schema import migrate
from simulation.world import World

DIALECT: Any = sqlite.dialect(paramstyle="qmark")
Convert = Callable[[Any], Any] | None


class Result:
    """As `sqlalchemy.Result`, as far as the ledger asks one."""

    def __init__(self, names: Sequence[str], rows: list[tuple[Any, ...]], cursor: sqlite3.Cursor) -> None:
        self._names, self._rows, self._cursor = names, rows, cursor

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)

    def mappings(self) -> Mappings:
        return Mappings([dict(zip(self._names, row, strict=True)) for row in self._rows])

    def one(self) -> tuple[Any, ...]:
        (row,) = self._rows
        return row

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None

    @property
    def rowcount(self) -> int:
        return self._cursor.rowcount

    @property
    def inserted_primary_key(self) -> tuple[int | None, ...]:
        return (self._cursor.lastrowid,)


class Mappings(list[dict[str, Any]]):
    def first(self) -> dict[str, Any] | None:
        return self[0] if self else None

    def one(self) -> dict[str, Any]:
        (row,) = self
        return row


class Statement:
    """A statement that is compiled: its SQL, and how values go in and come out."""

    def __init__(self, statement: Any, cache_key: Any, keys: list[str] | None) -> None:
        self.compiled = statement._compiler(DIALECT, cache_key=cache_key, column_keys=keys)
        self.expands = bool(self.compiled.post_compile_params)
        self._into: dict[str, Callable[[Any], Any]] = self.compiled._bind_processors
        entries = self.compiled._result_columns
        self.names = [entry.keyname for entry in entries]
        kinds = [entry.type.dialect_impl(DIALECT) for entry in entries]
        found: list[Convert] = [kind.result_processor(DIALECT, None) for kind in kinds]
        self._out = [(place, convert) for place, convert in enumerate(found) if convert is not None]

    def run(self, raw: sqlite3.Connection, values: dict[str, Any]) -> Result:
        text, order = self.compiled.string, self.compiled.positiontup
        if self.expands:
            state = self.compiled.construct_expanded_state(values)
            text, order, values = state.statement, state.positiontup, state.parameters
        into = self._into
        cursor = raw.execute(text, [into[name](values[name]) if name in into else values[name] for name in order])
        rows = cursor.fetchall() if cursor.description else []
        names = self.names or [column[0] for column in cursor.description or ()]
        if self._out:
            rows = [self._read(row) for row in rows]
        return Result(names, rows, cursor)

    def _read(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        values = list(row)
        for place, convert in self._out:
            values[place] = convert(values[place])
        return tuple(values)


BUILT_ONCE = {kept for module in (ledger, reader) for kept in vars(module).values() if isinstance(kept, sa.Executable)}
"""Statements that the product keeps: they are known by themselves, without a look at what they are made of."""
_compiled: dict[Any, Statement] = {}


class Connection:
    """As `sqlalchemy.Connection`."""

    def __init__(self, raw: sqlite3.Connection) -> None:
        self._raw = raw
        self.connection = SimpleNamespace(driver_connection=raw)

    def execute(self, statement: Any, values: Any = None) -> Result:
        if isinstance(values, list):
            for row in values[1:]:
                self.execute(statement, row)
            values = values[0]
        keys = None if values is None else list(values)
        key = None if statement in BUILT_ONCE else statement._generate_cache_key()
        known = (statement if key is None else key.key, None if keys is None else tuple(keys))
        found = _compiled.get(known)
        if found is None:
            found = _compiled[known] = Statement(statement, key, keys)
        extracted = None if key is None else key.bindparams
        given = found.compiled.construct_params(values, extracted_parameters=extracted, escape_names=False)
        with _as_sqlalchemy():
            return found.run(self._raw, given)

    def scalar(self, statement: Any, values: Any = None) -> Any:
        return self.execute(statement, values).scalar()

    def exec_driver_sql(self, text: str, values: Any = None) -> Result:
        with _as_sqlalchemy():
            if isinstance(values, list):
                return Result((), [], self._raw.executemany(text, values))
            cursor = self._raw.execute(text, values or ())
            return Result((), cursor.fetchall(), cursor)


@sa.inspection._inspects(Connection)
def _inspected(connection: Connection) -> SimpleNamespace:
    """As `sqlalchemy.inspect`: the ledger has its tables."""
    return SimpleNamespace(has_table=lambda name: True)


@contextlib.contextmanager
def _as_sqlalchemy() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        kind = IntegrityError if isinstance(error, sqlite3.IntegrityError) else OperationalError
        raise kind("", {}, error) from error


class Engine:
    """As `sqlalchemy.Engine`: that of the history which runs now."""

    database: Database

    @contextlib.contextmanager
    def connect(self) -> Iterator[Connection]:
        database = self.database
        database.world.moment("read", "ledger")
        try:
            yield Connection(database.raw)
        finally:
            database.raw.rollback()

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        with self.connect() as connection:
            yield connection
            self.database.world.moment("commit", "ledger")
            self.database.raw.commit()

    def dispose(self) -> None:
        pass


ENGINE = Engine()


def empty() -> bytes:
    """A new ledger with its tables, without the sums of its charts."""
    raw = sqlite3.connect(":memory:")
    hashed_rows.prepare(raw)
    engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    with engine.begin() as connection:
        migrate(connection, "the ledger")
        for name in ("trends_added", "trends_deleted"):
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
    return raw.serialize()


class Database:
    """The ledger of one history, which is that of every `Store` from now on."""

    def __init__(self, world: World, kept: bytes) -> None:
        """`kept`: a ledger to begin with."""
        self.world = world
        self.raw = sqlite3.connect(":memory:", check_same_thread=False)
        self.raw.deserialize(kept)
        hashed_rows.prepare(self.raw)
        ENGINE.database = self

    @property
    def outside(self) -> Store:
        """A store of another process."""
        store = object.__new__(Store)
        store.path, store._engine = self.world.root / "ledger.sqlite", ENGINE  # type: ignore[assignment]
        return store

    def killed(self) -> None:
        self.raw.rollback()

    def refuse(self, why: str) -> NoReturn:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError(why))

    def close(self) -> None:
        self.raw.close()
