"""The lease of a run folder, for file systems without locks: a claim that is renewed, and may be taken over once it is still.

<run>/.lease/00000007    the claim of the runner with the fencing token 7: who it is (JSON), renewed all the time

The greatest number has the folder. A claim is made by creating its file, which only one process can do (O_EXCL), and a runner
writes no file but its own: one that slept through its time cannot overwrite a later claim. Nobody compares the clocks of two
hosts. Whoever wants the folder watches the file of the claim for its whole time, by its own clock. The runner itself counts
from the beginning of its last renewal, stops earlier than that, and counts the time in which its machine slept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from selfplay.errors import InUseError, LockLost
from selfplay.storage.runner import Runner

FOLDER = ".lease"
RENEWALS = 10  # in the time of a lease
HELD = 0.75  # of its time, after which a runner that could not renew its lease has lost it


def is_used(run_dir: Path) -> bool:
    """Whether the last runner of a folder worked there by a lease."""
    return (run_dir / FOLDER).is_dir()


class Lease:
    """The claim of this process to a run folder. `acquire` it, then `check` it before each write that counts.

    note: is told when it has to wait. lost: is called in the thread that renews the claim, once that is lost; by default the
    process ends there and then, for any of its threads may be about to write.
    """

    def __init__(
        self, run_dir: Path, seconds: float, note: Callable[[str], None] = lambda text: None,
        lost: Callable[[LockLost], None] | None = None,
    ) -> None:  # fmt: skip
        self._dir, self._folder, self._seconds = run_dir, run_dir / FOLDER, seconds
        self._note, self._lost = note, lost or _end
        self.token = 0
        self._record: Runner
        self._renewed = 0.0
        self._released = threading.Event()
        self._beat = 0
        self._writing = threading.Lock()

    @property
    def file(self) -> Path:
        """The file of the claim."""
        return self._folder / f"{self.token:08d}"

    @property
    def held_seconds(self) -> float:
        """Seconds without a renewal after which the claim counts as lost for whoever works under it."""
        return self._seconds * HELD

    def acquire(self) -> None:
        """Claim the folder. Raises InUseError where another runner renews its claim; waits to see whether it does."""
        self._folder.mkdir(exist_ok=True)
        while True:
            token, content = self._last()
            if token and not self._is_over(content) and not self._stays_still(token, content):
                continue
            if self._claim(token + 1):
                break
        for older in self._folder.iterdir():
            if older.name != self.file.name:
                older.unlink(missing_ok=True)
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def look(self) -> None:
        """Raise InUseError unless nobody has the folder, as far as can be seen without waiting."""
        token, content = self._last()
        if token and not self._is_over(content):
            raise InUseError(
                f"{self._dir} is claimed by {Runner.read(content) or 'another process'}",
                f"a start watches this claim for up to {max(self._seconds, _seconds(content)):.0f} s, and goes on where nobody renews it",
            )

    def raise_to(self, token: int) -> None:
        """Claim a greater number: the ledger knows of a later runner than the files do, which were lost."""
        with self._writing:
            if token > self.token:
                before = self.file
                if not self._claim(token):
                    raise LockLost(*_lost_to(self._dir, "another runner"))
                before.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise LockLost unless this process has the folder still."""
        if _now() - self._renewed > self.held_seconds:
            raise LockLost(
                f"{self._dir}: the lease could not be renewed for {self.held_seconds:.0f} s, so another process may have taken "
                "the folder over",
                "see whether the file system of the run folder answers, and whether this process or its machine was stopped; "
                "then start again: finished stages are kept",
            )
        try:
            token, content = self._last()
        except FileNotFoundError:
            raise LockLost(
                f"{self._folder} is not there any more: the run folder was moved or deleted while this process worked in it",
                "start it again with the folder's new place (--run-dir, or run.dir and run.name): finished stages are kept",
            ) from None
        if token != self.token:
            raise LockLost(*_lost_to(self._dir, str(Runner.read(content) or "another process")))

    def release(self, dissolve: bool = False) -> None:
        """Leave the folder. `dissolve`: it is locked in another way from now on."""
        self._released.set()
        with self._writing, contextlib.suppress(OSError, LockLost):
            self.check()
            if dissolve:
                shutil.rmtree(self._folder)
            else:
                self._write(ended=True)

    def _claim(self, token: int) -> bool:
        """Create the file of a claim; False where somebody else was quicker."""
        began = _now()
        try:
            os.close(os.open(self._folder / f"{token:08d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        self.token, self._renewed = token, began
        self._record = Runner.here(self._dir, token)
        self._write()
        return True

    def _write(self, ended: bool = False) -> None:
        self._beat += 1
        record = dataclasses.replace(self._record, ended=ended).written()
        partial = self._folder / f".{self.file.name}.partial"
        partial.write_text(json.dumps({**record, "seconds": self._seconds, "renewals": self._beat}), encoding="utf-8")
        partial.rename(self.file)

    def _keep(self) -> None:
        """Renew the claim until it is released or lost."""
        while not self._released.wait(self._seconds / RENEWALS):
            try:
                with self._writing:
                    if self._released.is_set():
                        return
                    began = _now()
                    self.check()
                    self._write()
                    self.check()
                    self._renewed = began
            except LockLost as error:
                if not self._released.is_set():
                    self._lost(error)
                return
            except OSError:
                continue  # it is tried again until the time of the claim is over

    def _last(self) -> tuple[int, bytes]:
        """The greatest token and what its file says; 0 where nobody has claimed the folder."""
        # To list the folder asks the server of a network file system; to look for one name may be answered from memory.
        found = max((int(name) for name in os.listdir(self._folder) if name.isdigit()), default=0)
        try:
            return found, (self._folder / f"{found:08d}").read_bytes() if found else b""
        except FileNotFoundError:  # somebody tidied up after a later claim
            return self._last()

    def _is_over(self, content: bytes) -> bool:
        """Whether its runner has left, or is provably gone. Names of machines prove nothing: clones share them."""
        claim = Runner.read(content)
        return claim is not None and claim.fate in ("ended", "gone")

    def _stays_still(self, token: int, content: bytes) -> bool:
        """Watch a claim for its time. Raises InUseError where it is renewed; False where another claim was made, or it ended."""
        claim = Runner.read(content)
        seconds = max(self._seconds, _seconds(content))
        who = str(claim or "another process")
        self._note(f"waiting for up to {seconds:.0f} s to see whether {who} still works in {self._dir}")
        since = time.monotonic()  # which stands still while this machine sleeps: the runner may be on it
        while time.monotonic() - since < seconds:
            time.sleep(min(1.0, seconds / RENEWALS))
            now = self._last()
            if now[0] != token or self._is_over(now[1]):
                return False
            if now[1] != content and content:
                raise InUseError(
                    f"{self._dir} is in use by {who}", "wait for it or end it; another run needs another folder"
                )
            content = now[1]  # the first word of a claim that was just made
        return True


def _lost_to(run_dir: Path, who: str) -> tuple[str, str]:
    return (
        f"{run_dir} was taken over by {who}: this process stops, and writes nothing more there",
        "let that one work, or end it and start again: finished stages are kept",
    )


def _seconds(content: bytes) -> float:
    """The time of a claim, which its own runner has set; 0 for one that was just made."""
    try:
        return float(json.loads(content)["seconds"])
    except (ValueError, TypeError, KeyError):
        return 0.0


def _now() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _end(error: LockLost) -> None:
    """End this process at once; its children end with it."""
    print(f"error: {error}\nwhat to do: {error.hint}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
