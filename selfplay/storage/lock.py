"""The lock of a run folder: whoever holds it is the folder's only runner.

With `run.locks: flock` the kernel locks the file `.lock` and the folder itself, and releases both however the process ends. With
`lease` a claim is renewed in `.lease`; the locks are taken too where there are any. The record of the runner, with a fencing
token that only grows, is in the lock, in the lease and in the ledger. By it a folder knows that it is a copy of one in which
somebody may still work.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from selfplay.config.run import RunConfig
from selfplay.errors import InputError, InUseError, LockLost
from selfplay.storage import fences, filesystem, folders, sqlite_files
from selfplay.storage.lease import Lease, is_used
from selfplay.storage.runner import Runner

FILE, STATE = ".lock", "runner"  # the name of the record among the states of the ledger
HINT = "wait for it or end it; another run needs another folder"
MOVED = "start it again with the folder's new place (--run-dir, or run.dir and run.name): finished stages are kept"


class Ledger(Protocol):
    """What the lock needs of the ledger."""

    @property
    def version(self) -> int: ...
    def state(self, name: str) -> Any: ...
    def set_state(self, name: str, value: Any) -> None: ...
    def event(self, kind: str, text: str) -> None: ...
    def close(self) -> None: ...


class RunLock:
    """The right to run in a folder, which one process has at a time: enter it, then open the ledger with it, which registers
    the runner. `check` tells whether it is held still; writes below the folder ask it (`fences`).

    Entering makes the folder. Raises InputError where the folder cannot be made or used, and InUseError where another process
    has it.
    locks: None for those that the last runner had.
    note: is told when it has to wait, for a lease. take_over: the folder is a copy, or its runner is on another machine, and
    a person says that nobody else is at work in it.
    """

    def __init__(
        self, run_dir: Path, locks: filesystem.Locks | None = None, seconds: float = 60.0,
        note: Callable[[str], None] = lambda text: None, take_over: bool = False,
    ) -> None:  # fmt: skip
        self.dir, self._seconds = run_dir, seconds
        self._locks: filesystem.Locks = locks or ("lease" if is_used(run_dir) else "flock")
        self._note, self._take_over = note, take_over
        self._folder: int | None = None  # descriptors that hold locks; None where the file system has no such lock
        self._file: int | None = None
        self._inodes: dict[int, tuple[int, int] | None] = {}  # of both, by descriptor: as long as it is open, it stays
        self.lease: Lease | None = None
        self.runner: Runner | None = None
        self._said: Runner | None = None  # what the lock file says of this process
        self._ledger: Ledger | None = None
        self._restoring = threading.Lock()

    @classmethod
    def of(cls, settings: RunConfig, run_dir: Path, note: Callable[[str], None] = lambda text: None) -> RunLock:
        """The lock that a configuration wants."""
        return cls(run_dir, settings.locks, settings.lease_seconds, note)

    def __enter__(self) -> RunLock:
        filesystem.require(self.dir, self._locks)
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.dir} cannot be a run folder: {error}", "choose another one (--run-dir)") from None
        try:
            with folders.disk_errors(self.dir / FILE):
                self._hold()
        except BaseException:
            self._close()
            raise
        filesystem.clean(self.dir)
        fences.put_up(self.dir, self.check)
        return self

    def _hold(self) -> None:
        self._folder = self._locked(os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY), needed=False)
        self._file = self._lock_file()
        if self._locks == "lease" or is_used(self.dir):
            self.lease = Lease(self.dir, self._seconds, self._note)
            self.lease.acquire()
            sqlite_files.break_locks(self.dir)
            if self._locks == "flock":  # its last runner worked by a lease, and is gone
                self.lease.release(dissolve=True)
                self.lease = None
        self._write()

    def __exit__(self, *_: object) -> None:
        fences.take_down(self.dir, self.check)
        if self.runner is not None and self._ledger is not None:
            # By this a copy of the folder knows that nobody works in this one. Where it cannot be written, the process is gone soon.
            with contextlib.suppress(Exception):
                self._ledger.set_state(STATE, replace(self.runner, ended=True).written())
            self._ledger.close()
        self._close()

    @property
    def claim(self) -> tuple[Path, float] | None:
        """The file of the lease, and the seconds without a renewal after which it counts as lost; None without a lease."""
        return None if self.lease is None else (self.lease.file, self.lease.held_seconds)

    def register(self, ledger: Ledger) -> None:
        """Enter this process in the ledger as the runner of the folder, once. Raises InUseError where the folder is a copy of
        one in which somebody may work, and where somebody may work in it for all that the locks say."""
        if self.runner is not None:
            return
        before, here = Runner.read(ledger.state(STATE)), self._said or self._here()
        if before is not None:
            self._require_left(before, here)
        token = max((before.token if before else 0) + 1, self.lease.token if self.lease else 0)
        if self.lease is not None:
            self.lease.raise_to(token)
        self.runner = replace(here, token=token, ledger=ledger.version)
        self._ledger = ledger
        ledger.set_state(STATE, self.runner.written())
        if before is not None and before.path != here.path:
            ledger.event("runner", f"the run is in {here.path} from here on; before it was in {before.path}")
        self._write()

    def check(self) -> None:
        """Raise LockLost where this process has the folder no longer."""
        if self.lease is not None:
            self.lease.check()
            return
        self._require_place()
        file = self._file  # another thread may be making it anew
        if file is not None and _inode(self.dir / FILE) != self._inodes.get(file):
            if self._folder is None:
                raise LockLost(
                    f"{self.dir / FILE} was deleted or replaced while this process worked there, so another one may work now",
                    "see that no other process works there, and start again: finished stages are kept",
                )
            self._restore()

    def _require_place(self) -> None:
        """Raise LockLost where the folder, which this process has locked, is no longer where it was."""
        if self._folder is not None and _inode(self.dir) != self._inodes[self._folder]:
            raise LockLost(f"{self.dir} was moved, deleted or replaced while this process worked in it", MOVED)

    def _restore(self) -> None:
        """Make the lock file anew: the lock of the folder keeps others out, and the file says to them who has it."""
        with self._restoring:
            if self._file is not None and _inode(self.dir / FILE) == self._inodes[self._file]:
                return  # another thread was quicker
            if self._file is not None:
                os.close(self._file)
                self._file = None
            try:
                self._file = self._lock_file()
            except InputError as error:
                raise LockLost(str(error), error.hint) from None
            except OSError:
                self._require_place()  # it may have been moved since this was asked
                raise
            self._write()

    def look(self, ledger: Ledger) -> None:
        """Raise InUseError where another process works in the folder, or may work in it. Nothing is changed."""
        try:
            self._folder = self._locked(os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY), needed=False)
            if (self.dir / FILE).exists():
                self._file = self._locked(os.open(self.dir / FILE, os.O_RDONLY), needed=False)
            if is_used(self.dir):
                Lease(self.dir, self._seconds).look()
            elif (before := Runner.read(ledger.state(STATE))) is not None:
                self._require_left(before, self._here())
        finally:
            self._close()

    def _require_left(self, before: Runner, here: Runner) -> None:
        """Raise InUseError unless nobody can be at work by the record of the last runner, or a person has said so."""
        fate, same = before.fate, before.is_in(here)
        if fate in ("ended", "gone", "rebooted"):
            return
        if self.lease is not None and before.inode == here.inode:
            return  # its claim was watched
        if same and (self._folder is not None or (here.lock and here.lock == before.lock)):
            return  # its lock is free: nobody else works here
        if same and fate == "alive":
            raise InUseError(f"{self.dir} is in use by {before}, though its lock is free", HINT)
        if self._take_over:
            return
        works = "still works" if fate == "alive" else "may still work, for all that can be seen from here"
        what = "the ledger says that" if same else f"this is a copy of {before.path} on {before.host}, where"
        raise InUseError(
            f"{self.dir}: {what} {before} {works}",
            "see whether it does. Where it does not, or this copy is to go its own way: `selfplay take-over`, then start again "
            "(docs/operations.md, Move, copy, restore)",
        )

    def _lock_file(self) -> int | None:
        while True:
            path = self.dir / FILE
            file = self._locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), needed=self._locks == "flock")
            if file is None or _inode(path) == self._inodes[file]:
                return file
            os.close(file)  # it was replaced between the two calls

    def _locked(self, descriptor: int, needed: bool) -> int | None:
        """Lock an open file, which is closed where that fails; None where the file system has no such lock."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EWOULDBLOCK:
                raise InUseError(f"{self.dir} is in use by {self._holder()}", HINT) from None
            if needed:
                error.filename = str(self.dir / FILE)
                raise
            return None
        self._inodes[descriptor] = _inode(descriptor)
        return descriptor

    def _here(self) -> Runner:
        inode = None if self._file is None else self._inodes[self._file]
        return Runner.here(self.dir, lock=inode[1] if inode else 0)

    def _holder(self) -> str:
        """Who wrote the lock file, in words."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads((self.dir / FILE).read_bytes())
            return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        return "another process"

    def _write(self) -> None:
        """Have the lock file say who holds it."""
        if self._file is not None:
            self._said = self.runner or self._here()
            text = json.dumps(self._said.written()).encode()
            os.pwrite(self._file, text, 0)
            os.ftruncate(self._file, len(text))

    def _close(self) -> None:
        if self.lease is not None:
            self.lease.release()
        for descriptor in (self._file, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._file = self._folder = None


def _inode(where: Path | int) -> tuple[int, int] | None:
    """Device and inode of a path or of an open file; None where nothing is there."""
    try:
        found = os.stat(where)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
