"""The boundary to the ledger: SQLite in memory, one connection for all, each transaction a moment.

A killed process leaves what it has committed, and a transaction that is rolled back. The statements are those of the product:
SQLAlchemy compiles each once, and then they go to SQLite directly, which takes a third of the time.

A history is one transaction of SQLite, which is rolled back at its end, and those of the product are savepoints in it. So the
next history has the ledger as it was, and a connection whose statements and triggers are prepared.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        self._names, self._rows = names, rows
        self.rowcount, self.inserted_primary_key = cursor.rowcount, (cursor.lastrowid,)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self._rows)

    def mappings(self) -> Mappings:
        return Mappings(self._names, self._rows)

    def one(self) -> tuple[Any, ...]:
        (row,) = self._rows
        return row

    def scalar(self) -> Any:
        return self._rows[0][0] if self._rows else None


class Mappings:
    """As `sqlalchemy.MappingResult`. In a loop its rows are what `dict` makes a mapping of: the ledger asks no more of them."""

    def __init__(self, names: Sequence[str], rows: list[tuple[Any, ...]]) -> None:
        self._names, self._rows = names, rows

    def __iter__(self) -> Iterator[Iterable[tuple[str, Any]]]:
        names = self._names
        return (zip(names, row, strict=True) for row in self._rows)

    def first(self) -> dict[str, Any] | None:
        return next(map(dict, self), None)

    def one(self) -> dict[str, Any]:
        (row,) = self
        return dict(row)


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
        self._text, order = self.compiled.string, self.compiled.positiontup or ()
        self._order = [(name, self._into.get(name)) for name in order]
        self._names = None if any(into for _, into in self._order) else list(order)
        """Of the values, where all of them go in as they are."""
        given = self.compiled.construct_params(escape_names=False, _check=False)
        self.given: dict[str, Any] = {} if set(order) <= set(keys or ()) else given
        """What the statement itself says of its values, where it needs more than it is given."""

    def run(self, cursor: sqlite3.Cursor, values: dict[str, Any]) -> Result:
        text = self._text
        if self.expands:
            state = self.compiled.construct_expanded_state(values)
            text, values = state.statement, state.parameters
            given = self._converted(values, [(name, self._into.get(name)) for name in state.positiontup])
        elif self._names is None:
            given = self._converted(values, self._order)
        else:
            given = [values[name] for name in self._names]
        try:
            cursor.execute(text, given)
        except sqlite3.Error as error:
            raise _known(error) from error
        rows = cursor.fetchall()
        if self._out:
            rows = [self._read(row) for row in rows]
        if not self.names and cursor.description:  # it is a text, whose columns only SQLite knows
            self.names = [column[0] for column in cursor.description]
        return Result(self.names, rows, cursor)

    @staticmethod
    def _converted(values: dict[str, Any], order: list[tuple[str, Convert]]) -> list[Any]:
        return [values[name] if into is None else into(values[name]) for name, into in order]

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
        self._cursor = raw.cursor()  # of all statements, each of which is read to its end at once
        self.connection = SimpleNamespace(driver_connection=raw)

    def execute(self, statement: Any, values: Any = None) -> Result:
        if isinstance(values, list):
            for row in values[1:]:
                self.execute(statement, row)
            values = values[0]
        key, kept = None, statement
        if statement not in BUILT_ONCE:
            key = None if isinstance(statement, sa.TextClause) else statement._generate_cache_key()
            kept = statement.text if key is None else key.key
        known = (kept, *values) if values else kept
        found = _compiled.get(known)
        if found is None:
            found = _compiled[known] = Statement(statement, key, None if values is None else list(values))
        if key is None:
            return found.run(self._cursor, {**found.given, **(values or {})} if found.given else values or {})
        given = found.compiled.construct_params(values, extracted_parameters=key.bindparams, escape_names=False)
        return found.run(self._cursor, given)

    def scalar(self, statement: Any, values: Any = None) -> Any:
        return self.execute(statement, values).scalar()

    def exec_driver_sql(self, text: str, values: Any = None) -> Result:
        if isinstance(values, list):
            for row in values:
                _sent(self._cursor, text, row)
            return Result((), [], self._cursor)
        return Result((), _sent(self._cursor, text, values or ()).fetchall(), self._cursor)


@sa.inspection._inspects(Connection)
def _inspected(connection: Connection) -> SimpleNamespace:
    """As `sqlalchemy.inspect`: the ledger has its tables."""
    return SimpleNamespace(has_table=lambda name: True)


def _sent(cursor: sqlite3.Cursor, text: str, values: Sequence[Any]) -> sqlite3.Cursor:
    """Run a statement; errors are those of SQLAlchemy."""
    try:
        return cursor.execute(text, values)
    except sqlite3.Error as error:
        raise _known(error) from error


def _known(error: sqlite3.Error) -> Exception:
    kind = IntegrityError if isinstance(error, sqlite3.IntegrityError) else OperationalError
    return kind("", {}, error)


class Reading:
    """As `Engine.connect`: a look at the ledger."""

    def __init__(self, world: World, connection: Connection) -> None:
        self._moment, self._connection = world.moment, connection

    def __enter__(self) -> Connection:
        self._moment("read", "ledger")
        return self._connection

    def __exit__(self, *error: object) -> None:
        pass


class Transaction(Reading):
    """As `Engine.begin`: what it writes holds where it ends without an error."""

    def __init__(self, world: World, connection: Connection, cursor: sqlite3.Cursor) -> None:
        super().__init__(world, connection)
        self._sent = cursor.execute

    def __enter__(self) -> Connection:
        self._moment("read", "ledger")
        self._sent("SAVEPOINT product")
        return self._connection

    def __exit__(self, *error: object) -> None:
        holds = False
        try:
            if error[0] is None:
                self._moment("commit", "ledger")
                holds = True
        finally:
            if not holds:
                self._sent("ROLLBACK TO product")
            self._sent("RELEASE product")


class Engine:
    """As `sqlalchemy.Engine`: that of the history which runs now."""

    database: Database

    def connect(self) -> Reading:
        return self.database.reading

    def begin(self) -> Transaction:
        return self.database.transaction

    def dispose(self) -> None:
        pass


ENGINE = Engine()


def empty() -> bytes:
    """A new ledger with its tables, without the sums of its charts."""
    raw = sqlite3.connect(":memory:")
    raw.execute("PRAGMA page_size=1024")  # what may be rolled back is copied by the page, and rows are small
    hashed_rows.prepare(raw)
    engine = sa.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    with engine.begin() as connection:
        migrate(connection, "the ledger")
        for name in ("trends_added", "trends_deleted"):
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
    return raw.serialize()


def opened(kept: bytes) -> sqlite3.Connection:
    """A ledger in memory, for histories that begin with `kept`, one after another."""
    raw = sqlite3.connect(":memory:", isolation_level=None, cached_statements=512, check_same_thread=False)
    raw.deserialize(kept)
    raw.execute("PRAGMA secure_delete=OFF")  # what is deleted in memory need not be overwritten with zeros
    hashed_rows.prepare(raw)
    return raw


class Database:
    """The ledger of one history, which is that of every `Store` from now on."""

    def __init__(self, world: World, raw: sqlite3.Connection) -> None:
        """`raw`: see `opened`."""
        self.world, self.raw = world, raw
        connection = Connection(raw)
        self.reading, self.transaction = Reading(world, connection), Transaction(world, connection, raw.cursor())
        raw.execute("BEGIN")
        ENGINE.database = self

    @property
    def outside(self) -> Store:
        """A store of another process."""
        store = object.__new__(Store)
        store.path, store._engine = self.world.root / "ledger.sqlite", ENGINE  # type: ignore[assignment]
        return store

    def refuse(self, why: str) -> NoReturn:
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError(why))

    def keep(self) -> bytes:
        """The ledger as it is, which later histories begin with."""
        self.raw.execute("COMMIT")
        kept = self.raw.serialize()
        self.raw.execute("BEGIN")
        return kept

    def close(self) -> None:
        """Put the ledger back as it was when the history began."""
        assert self.raw.in_transaction, "nothing ends the transaction that is the history"
        self.raw.execute("ROLLBACK")
