"""Scores that were paid for once: a bounded SQLite file, least recently used first out, shared by processes.

A key names what scored (weights and template) and what was scored, so that an entry is never wrong, only unneeded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path

from selfplay.errors import InputError, RewardError
from selfplay.storage.folders import disk_errors

BUSY = 60.0  # seconds to wait for another process that writes
PLACE = "see that this user may write there and nobody else holds the file, or give another reward.cache.path, or set reward.cache.entries to 0"
AT_ONCE = 500  # keys in a query, below SQLite's limit of variables


def key(identity: str, messages: Sequence[Mapping[str, str]], response: str) -> bytes:
    """SHA-256 of what scores and what it reads. `identity` holds the hashes of weights and template."""
    read = [identity, [[m["role"], m["content"]] for m in messages], response]
    return hashlib.sha256(json.dumps(read, separators=(",", ":")).encode()).digest()


class ScoreCache:
    """At most `entries` scores in `path`, and a thousandth more for each process. May be used by several threads, and by
    several processes at a time.

    Raises RewardError where the file is no cache, DiskError where its disk is full.
    """

    def __init__(self, path: Path, entries: int) -> None:
        self.path, self._entries = path, entries
        self._lock = threading.Lock()
        self._uncounted = entries  # scores put since they were all counted, which takes 20 ms for a million
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._disk():
                self._connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"the cache of scores cannot be in {path.parent}: {error.strerror}", PLACE) from None
        try:
            with self._disk():
                # Without full durability a crash of the machine costs entries, never a wrong one.
                for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
                    self._connection.execute(f"PRAGMA {pragma}")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL, used INTEGER NOT NULL) "
                    "WITHOUT ROWID"
                )
                self._connection.execute("CREATE INDEX IF NOT EXISTS by_use ON scores (used)")
        except BaseException:
            self._connection.close()
            raise

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The scores that are there; they count as used now."""
        found: dict[bytes, float] = {}
        with self._lock, self._disk():
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(part))
                found |= self._connection.execute(
                    f"SELECT key, score FROM scores WHERE key IN ({marks})", part
                ).fetchall()
            if found:
                self._write("UPDATE scores SET used = ? WHERE key = ?", [(k,) for k in found])
        return found

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Keep finite scores, at the cost of those that were not used for longest."""
        assert all(isfinite(v) for v in scores.values()), "a missing score is never kept: it is asked for again"
        with self._lock, self._disk():
            self._uncounted += len(scores)
            self._write("INSERT OR REPLACE INTO scores (used, key, score) VALUES (?, ?, ?)", list(scores.items()))

    def remove(self, keys: Sequence[bytes]) -> None:
        """Take scores out that cannot be trusted."""
        with self._lock, self._disk():
            self._write("DELETE FROM scores WHERE used < ? AND key = ?", [(k,) for k in keys])

    def clear(self) -> None:
        with self._lock, self._disk():
            self._connection.execute("DELETE FROM scores")

    def count(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM scores").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Execute a statement for rows, each with the time of use before it, and shrink to the bound; one transaction."""
        # IMMEDIATE: a transaction that first reads and then finds another writer could not wait for it.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            now = self._connection.execute("SELECT coalesce(max(used), 0) + 1 FROM scores").fetchone()[0]
            self._connection.executemany(statement, [(now, *row) for row in rows])
            if is_due := self._uncounted > self._entries // 1000:
                self._connection.execute(
                    "DELETE FROM scores WHERE key IN (SELECT key FROM scores ORDER BY used, key LIMIT ?)",
                    (max(0, self.count() - self._entries),),
                )
            self._connection.execute("COMMIT")
            self._uncounted = 0 if is_due else self._uncounted
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn SQLite's errors into DiskError and RewardError."""
        try:
            with disk_errors(self.path):
                yield
        except sqlite3.DatabaseError as error:
            hint = PLACE if isinstance(error, sqlite3.OperationalError) else "delete that file: it only saves time"
            raise RewardError(f"the cache of scores {self.path} cannot be used: {error}", hint) from error
