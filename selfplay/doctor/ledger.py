"""The ledger: whether it is whole, whether its rows are what was written, and whether it agrees with the folder."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from selfplay.doctor import rebuild
from selfplay.doctor.finding import Finding
from selfplay.errors import CheckpointError, InputError
from selfplay.storage import agreement, sqlite_files, wal
from selfplay.storage.folders import MANIFEST
from selfplay.storage.ledger import LedgerError, Store
from selfplay.storage.manifests import read
from selfplay.storage.policies import Policies

NAME = "ledger.sqlite"
FROM_MANIFESTS = (
    "it is made from the records of closed rounds and the manifests; events, orders and a pause are not in these. What is there "
    "is kept as ledger.sqlite.damaged"
)


def opened(run_dir: Path) -> tuple[Store | None, Finding | None]:
    """The ledger, or what is wrong with all of it."""
    path = run_dir / NAME
    if what := wal.damage(log := run_dir / f"{NAME}-wal"):
        mend = (
            "the ledger goes on without these transactions; look once more afterwards whether it agrees with the folder"
        )
        return None, Finding(path=log, what=what, mend=mend, repair=functools.partial(_without_the_rest, path))
    if what := broken(path):
        return None, Finding(path=path, what=what, mend=FROM_MANIFESTS, repair=functools.partial(rebuild.make, run_dir))
    try:
        return Store(run_dir), None
    except (InputError, LedgerError, OSError) as error:
        hint = error.hint if isinstance(error, InputError) else "see that nobody else works with it"
        return None, Finding(path=path, what=str(error), mend=hint)


def broken(path: Path) -> str | None:
    """Why a file is no ledger; None where it is one. Nothing is written."""
    if not path.is_file() or not path.stat().st_size:
        return "it is gone" if not path.exists() else "it is empty"
    try:
        with contextlib.closing(sqlite3.connect(sqlite_files.uri(path, "rw"), uri=True, timeout=5)) as connection:
            said = [str(text) for (text,) in connection.execute("PRAGMA integrity_check(3)")]
            if said != ["ok"]:
                return "; ".join(said)
            if connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'rounds'").fetchone() == (0,):
                return "it is empty"
    except sqlite3.DatabaseError as error:
        return None if "locked" in str(error) else str(error)
    return None


def _without_the_rest(path: Path) -> None:
    """Have SQLite take over what it can read of the write-ahead log."""
    with contextlib.closing(sqlite3.connect(sqlite_files.uri(path), uri=True, timeout=5)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def look(run_dir: Path, store: Store) -> Iterator[Finding]:
    """Where rows are damaged, and where the ledger and the folder do not tell the same."""
    if rows := store.damaged_rows(every=True):
        what = f"{', '.join(map(str, rows[:3]))}{' and others' * (len(rows) > 3)} is not what was written"
        if {row.table for row in rows} <= {"metrics", "totals"}:
            mend = "metrics are taken from the manifests, and sums are counted again"
            yield Finding(path=store.path, what=what, mend=mend, repair=functools.partial(_count_again, run_dir, store))
        else:
            repair = functools.partial(rebuild.make, run_dir)
            yield Finding(path=store.path, what=what, mend=FROM_MANIFESTS, repair=repair)
        return  # what disagrees may be these rows
    if (wrong := agreement.current(store, run_dir)) is not None:
        version = store.serving()
        assert version is not None
        yield Finding(
            path=wrong.path, what=wrong.what, mend=f"{wrong.right}: it leads to policy {version} again",
            repair=functools.partial(Policies(run_dir).set_current, version),
        )  # fmt: skip
    for found in (*agreement.rounds(store, run_dir), *_policies(store, run_dir)):
        without = _going_on_without(run_dir, store, found.path)
        mend = found.right if without is None else f"{found.right}; without one, the run goes on without it"
        yield Finding(path=found.path, what=found.what, mend=mend, repair=without)
    yield from _metrics(run_dir, store)


def _going_on_without(run_dir: Path, store: Store, path: Path) -> Callable[[], None] | None:
    """Have the ledger know that the folder of a round, or that of a policy, is gone for good. None where it is there, where
    the policy serves, is pinned or belongs to the open round, and where all rounds are gone, as without their disk."""
    if path.exists():
        return None
    if path.parent == run_dir / "rounds":
        return functools.partial(_without_round, store, int(path.name)) if any(path.parent.glob("[0-9]*")) else None
    version = int(path.parent.name)
    row, is_open = store.policy(version), store.unfinished()
    needed = {0, store.serving(), *((is_open["champion"], is_open["sampler"], is_open["round"]) if is_open else ())}
    if row is None or row["pinned"] or version in needed or path.parent.is_dir():
        return None
    return functools.partial(store.weights_deleted, [version])


def _without_round(store: Store, index: int) -> None:
    store.set_state(agreement.LOST, sorted({*store.state(agreement.LOST, []), index}))


def _policies(store: Store, run_dir: Path) -> list[agreement.Disagreement]:
    try:
        return list(agreement.kept_policies(store, run_dir))
    except CheckpointError:  # a manifest that cannot be read is found among the policies
        return []


def _metrics(run_dir: Path, store: Store) -> Iterator[Finding]:
    """Stages whose metrics in the ledger are not those of their manifests."""
    for row in store.rounds():
        known = store.metrics(row["round"])
        for path in sorted((run_dir / "rounds" / f"{row['round']:04d}").glob(f"*/{MANIFEST}")):
            try:
                found = read(path)
            except CheckpointError:
                continue
            stage = path.parent.name
            ours = {name: value for name, value in known.items() if name.startswith(f"{stage}/")}
            theirs = {f"{stage}/{name}": float(value) for name, value in found["metrics"].items()}
            if ours and ours != theirs:
                yield Finding(
                    path=store.path, what=f"the metrics of {stage} in round {row['round']} are not those of {path}",
                    mend="they are taken from the manifest", repair=functools.partial(_record, store, row["round"], path),
                )  # fmt: skip


def _count_again(run_dir: Path, store: Store) -> None:
    for found in _metrics(run_dir, store):
        assert found.repair is not None
        found.repair()
    store.count_again()


def _record(store: Store, index: int, path: Path) -> None:
    found = read(path)
    store.record_metrics(index, path.parent.name, found["metrics"])
