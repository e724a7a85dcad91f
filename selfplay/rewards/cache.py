"""Scores that were paid for once: a SQLite file of bounded size, which several processes may share.

A key names what scored (its weights and its template) and what was scored. So an entry is never wrong. It can only be one
that nobody needs any more, and the entries that were not used for longest go first. Each has a hash of its score, keyed by
its key: one that was damaged on disk, or came to another key, counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path

from pydantic_core import to_json

from selfplay.errors import InputError, RewardError
from selfplay.rewards.texts import Item
from selfplay.storage import seals, sqlite_files
from selfplay.storage.folders import disk_errors

BUSY = 60.0  # seconds to wait while another process writes
PLACE = "see that this user may write there and nobody else holds the file, or give another reward.cache.path, or set reward.cache.entries to 0"
REMOVE = "DELETE FROM scores WHERE used < ? AND key = ?"
AT_ONCE = 500  # keys in a query, below SQLite's limit of variables


def keys(identity: str, items: Sequence[Item]) -> list[bytes]:
    """For each item: SHA-256 of what scores it and of what is read. `identity` holds the hashes of weights and template.
    Messages that several items in a row share are hashed once."""
    found: list[bytes] = []
    last: Sequence[Mapping[str, str]] | None = None
    begun = hashlib.sha256()
    for messages, response, reference in items:
        if last is None or (messages is not last and messages != last):
            last = messages
            begun = hashlib.sha256(_json([identity, [[m["role"], m["content"]] for m in messages]])[:-1] + b",")
        whole = begun.copy()
        whole.update(_text(response))
        if reference is not None:
            whole.update(b"," + _text(reference))
        whole.update(b"]")
        found.append(whole.digest())
    return found


def hash_of(key: bytes, score: object) -> bytes | None:
    """A hash of a score, keyed by its key; None for what is none. SQLite keeps −0.0 as 0.0, so both have the same hash."""
    if not isinstance(score, float) or not isinstance(key, bytes) or len(key) > hashlib.blake2b.MAX_KEY_SIZE:
        return None
    return hashlib.blake2b(struct.pack("<d", score + 0.0), key=key, digest_size=8).digest()


def _json(value: object) -> bytes:
    return _encode(value).encode()  # ASCII, so that a lone surrogate has a key too


def _text(text: str) -> bytes:
    """`_json` of a text. Most texts are plain ASCII, for which pydantic's encoder gives the same in a quarter of the time."""
    return to_json(text) if text.isascii() and "\x7f" not in text else _json(text)


_encode = json.JSONEncoder(separators=(",", ":")).encode


class ScoreCache:
    """At most `entries` scores in the file `path`, and a thousandth more for each process that writes. Several threads and
    several processes may use it at a time.

    `used` in the file is a clock that counts uses: each write sets it forward by the number of entries that it touches. An
    entry that is found counts as used only once the clock is an eighth of `entries` ahead of it. So an entry goes when at
    least seven eighths as many others were used since, and a score that is found again and again is seldom written.

    Raises RewardError where the file is no cache, DiskError where its disk is full.
    """

    def __init__(self, path: Path, entries: int) -> None:
        self.path, self._entries = path, entries
        self._lock = threading.Lock()
        self._uncounted = entries  # scores that were put since all were counted; to count a million takes 20 ms
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._disk():
                where = sqlite_files.uri(path)
                self._connection = sqlite3.connect(
                    where, timeout=BUSY, isolation_level=None, check_same_thread=False, uri=True
                )
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise InputError(f"the cache of scores cannot be in {path.parent}: {error.strerror}", PLACE) from None
        try:
            with self._disk():
                # Without full durability a crash of the machine costs entries, never a wrong one.
                sqlite_files.set_journal(self._connection, path)
                self._connection.execute("PRAGMA synchronous=NORMAL")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL NOT NULL, used INTEGER NOT NULL, "
                    "hash BLOB) WITHOUT ROWID"
                )
                self._connection.execute("CREATE INDEX IF NOT EXISTS by_use ON scores (used)")
                self._connection.create_function("hash_of", 2, hash_of, deterministic=True)
                self._hash_older()
        except BaseException:
            self._connection.close()
            raise

    def get(self, keys: Sequence[bytes]) -> dict[bytes, float]:
        """The scores that are there."""
        found: dict[bytes, float] = {}
        old: list[bytes] = []
        damaged: list[bytes] = []
        with self._lock, self._disk():
            oldest = self._clock() - self._entries // 8
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(part))
                rows = self._connection.execute(
                    f"SELECT key, score, hash, used FROM scores WHERE key IN ({marks})", part
                )
                for key, score, hashed, used in rows:
                    if hashed != hash_of(key, score):
                        damaged.append(key)
                        continue
                    found[key] = score
                    if used < oldest:
                        old.append(key)
            if damaged:
                self._write(REMOVE, [(key,) for key in damaged])
                seals.note_repair(f"{len(damaged)} scores in {self.path} were damaged, and are asked for again")
            if old:
                self._write("UPDATE scores SET used = ? WHERE key = ?", [(key,) for key in old])
        return found

    def put(self, scores: Mapping[bytes, float]) -> None:
        """Keep finite scores. Those that were not used for longest go where there is no room."""
        assert all(isfinite(v) for v in scores.values()), "a missing score is never kept: it is asked for again"
        with self._lock, self._disk():
            self._uncounted += len(scores)
            self._write(
                "INSERT OR REPLACE INTO scores (used, key, score, hash) VALUES (?, ?, ?, ?)",
                [(key, score, hash_of(key, float(score))) for key, score in scores.items()],
            )

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove scores that cannot be trusted."""
        with self._lock, self._disk():
            self._write(REMOVE, [(k,) for k in keys])

    def clear(self) -> None:
        with self._lock, self._disk():
            self._connection.execute("DELETE FROM scores")

    def count(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM scores").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _hash_older(self) -> None:
        """Give the rows of a file that an earlier version made their hashes, once."""
        if self._has_hashes():
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            if not self._has_hashes():  # another process may have been first
                self._connection.execute("ALTER TABLE scores ADD COLUMN hash BLOB")
                self._connection.execute("UPDATE scores SET hash = hash_of(key, score)")
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise

    def _has_hashes(self) -> bool:
        return any(row[1] == "hash" for row in self._connection.execute("PRAGMA table_info(scores)"))

    def _clock(self) -> int:
        return int(self._connection.execute("SELECT coalesce(max(used), 0) FROM scores").fetchone()[0])

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        """Execute a statement for rows, each with the new time of the clock before it, and shrink the file to its bound. All
        of it is one transaction."""
        # IMMEDIATE, because a transaction that first reads and then finds another writer cannot wait for it.
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            now = self._clock() + len(rows)
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
        """Raise SQLite's errors as DiskError and RewardError."""
        try:
            with disk_errors(self.path):
                yield
        except sqlite3.DatabaseError as error:
            hint = PLACE if isinstance(error, sqlite3.OperationalError) else "delete that file: it only saves time"
            raise RewardError(f"the cache of scores {self.path} cannot be used: {error}", hint) from error
