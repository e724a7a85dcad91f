"""What lies beside rounds and policies: the pool, the reward's files, answers that are kept for the run, and leftovers."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from selfplay.doctor.finding import Finding
from selfplay.errors import DamagedError
from selfplay.prompts import sealing
from selfplay.publishing import scratch
from selfplay.rewards import cache
from selfplay.storage import folders, seals, sqlite_files
from selfplay.storage.folders import MANIFEST
from selfplay.storage.ledger import Store

CACHE = Path("reward") / "scores.sqlite"
PROBES = Path("reward") / "probes.json"


def look(run_dir: Path, store: Store | None, open_round: int | None) -> Iterator[Finding]:
    """What is damaged or left over."""
    pool, known = run_dir / "pool", None if store is None else store.state(sealing.STATE)
    if not pool.is_dir():
        yield Finding(path=pool, what="it is gone", mend=sealing.MEND)
    elif known is not None or (pool / MANIFEST).is_file():  # an earlier version has left none
        for path, what in sealing.damaged(pool, known=known):
            yield Finding(path=path, what=what, mend=sealing.MEND)
    yield from _reward(run_dir)
    for folder in ("audit", "suites"):
        for path in sorted((run_dir / folder).glob("*.parquet")):
            if not seals.is_sealed(path):
                yield Finding(
                    path=path, what="it is not what its hash says", mend="it is made again", repair=_deleting(path)
                )
    for hashed in sorted((run_dir / "pool.parts").glob(f"*/*{seals.BESIDE}")):  # what a killed import left
        path = hashed.with_name(hashed.name.removesuffix(seals.BESIDE))
        if path.is_file() and not seals.is_sealed(path, earlier=False):
            yield Finding(
                path=path, what="it is not what its hash says", mend="it is made again", repair=_deleting(path)
            )
    yield from _leftovers(run_dir, open_round)


def _reward(run_dir: Path) -> Iterator[Finding]:
    path = run_dir / PROBES
    if path.is_file() and (what := _unreadable(path, ("round", "sources", "identities", "items", "scores"))):
        yield Finding(
            path=path, what=what,
            mend="put it back from a copy; if the reward is the same as ever, delete it, and the next round takes it as it is",
        )  # fmt: skip
    for path in sorted((run_dir / "reward").glob("*-scale.json")):
        if what := _unreadable(path, None):
            yield Finding(
                path=path, what=what, mend="put it back from a copy: rewards of later rounds are on this scale"
            )
    path = run_dir / CACHE
    if path.is_file() and (what := _cache(path)):
        yield Finding(
            path=path, what=what, mend="it is deleted, and scores are asked for again", repair=_deleting(path)
        )


def _cache(path: Path) -> str | None:
    """What is wrong with the cache of scores. Nothing is written to it."""
    try:
        connection = sqlite3.connect(sqlite_files.uri(path, "rw"), uri=True, timeout=5)
        try:
            connection.create_function("hash_of", 2, cache.hash_of)
            said = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            columns = {row[1] for row in connection.execute("PRAGMA table_info(scores)")}
            if said != "ok" or "score" not in columns:
                return str(said)
            if "hash" not in columns:  # of an earlier version
                return None
            (count,) = connection.execute(
                "SELECT count(*) FROM scores WHERE hash IS NOT hash_of(key, score)"
            ).fetchone()
            return f"{count} scores are not what their hashes say" if count else None
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return str(error)


def _leftovers(run_dir: Path, open_round: int | None) -> Iterator[Finding]:
    """What a killed process left: the next start would delete most of it."""
    left = [*run_dir.glob(".*.partial"), *run_dir.glob("*/.*.partial"), *run_dir.glob("rounds/*/.*.partial")]
    left += [*scratch.left(run_dir), *run_dir.glob(scratch.SERVICE)]
    for folder in (run_dir / "rounds").glob("[0-9]*"):
        if open_round is not None and int(folder.name) < open_round:
            left += [*folder.glob("*.shards"), *folder.glob("*.work")]
    for path in sorted(left):
        yield Finding(path=path, what="a process that was killed left it", mend="it is deleted", repair=_deleting(path))
    for name, kind in ((".lock", "file"), ("logs", "folder"), ("rounds", "folder"), ("policies", "folder")):
        path = run_dir / name
        if path.exists() and (path.is_dir() if kind == "file" else not path.is_dir()):
            yield Finding(path=path, what=f"it is no {kind}", mend="move it out of the run folder")


def _unreadable(path: Path, fields: tuple[str, ...] | None) -> str | None:
    try:
        seals.read_json(path, fields)
    except DamagedError as error:
        return error.what
    return None


def _deleting(path: Path) -> Callable[[], None]:
    return functools.partial(_delete, path)


def _delete(path: Path) -> None:
    for each in (path, seals.beside(path), path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        folders.delete(each)
