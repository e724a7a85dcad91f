"""Run folders on file systems without locks: real processes, which are stopped, killed and continued."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_world import HAS_COMPILER, until
from mini import TINY

from selfplay.config import load
from selfplay.errors import InUseError, LockLost
from selfplay.storage import folders, lease, sqlite_files
from selfplay.storage.ledger import LedgerError, Store
from selfplay.storage.lock import RunLock
from selfplay.storage.policies import Policies
from selfplay.web.view import View

NFS = "flock bytes memory links"  # what NFS without a lock daemon, SMB and mounts of object stores lack


def steps(run_dir: Path) -> list[str]:
    """The tokens of the runners that wrote to the ledger, in the order of their writing."""
    store = Store(run_dir)
    found = [event["text"] for event in store.events() if event["kind"] == "step"]
    store.close()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_a_runner_that_slept_through_its_lease_stops_without_a_write(tmp_path, runners):
    run_dir = tmp_path / "run"
    first = runners(run_dir, "lease", faults=NFS)
    token, child = first.working()
    refused = runners(run_dir, "lease", faults=NFS)
    code, said = refused.ended()
    assert (token, code) == (1, 2) and "is in use by process" in said  # its claim was renewed meanwhile
    until(lambda: steps(run_dir))
    first.signal(signal.SIGSTOP)
    second = runners(run_dir, "lease", faults=NFS)
    assert second.working()[0] == 2
    assert (
        not Path(f"/proc/{child}/cmdline").exists() or not Path(f"/proc/{child}/cmdline").read_bytes()
    )  # it has ended
    until(lambda: "2" in steps(run_dir))
    before = sorted(path.name for path in (run_dir / "rounds").iterdir() if path.name.startswith("1-"))
    first.signal(signal.SIGCONT)
    code, said = first.ended()
    assert (code == 3 and "stops, and writes nothing more" in said) or "the lease could not be renewed" in said
    at = len(steps(run_dir))
    until(lambda: len(steps(run_dir)) > at + 3)
    found = steps(run_dir)
    assert found == sorted(found) and folders.read_json(run_dir / "last.json") == 2
    assert sorted(path.name for path in (run_dir / "rounds").iterdir() if path.name.startswith("1-")) == before


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_a_killed_runner_is_followed_at_once_by_one_that_can_see_that_it_is_gone(tmp_path, runners, monkeypatch):
    run_dir = tmp_path / "run"
    first = runners(run_dir, "lease", faults=NFS)
    first.working()
    until(lambda: steps(run_dir))
    first.kill()
    monkeypatch.setattr(
        lease.Lease, "_stays_still", lambda *_: pytest.fail("nobody has to wait for a process that is gone")
    )
    with RunLock(run_dir, "lease", 60.0) as lock:
        store = Store(run_dir, lock)
        assert lock.runner.token == 2 and store.events()[-1]["kind"] == "step"
        store.close()


def test_only_one_of_two_claims_the_same_number(tmp_path):
    first, second = lease.Lease(tmp_path, 60.0), lease.Lease(tmp_path, 60.0)
    (tmp_path / ".lease").mkdir()
    assert first._claim(1) and not second._claim(1)


def test_a_lease_that_another_has_or_that_is_too_old_is_lost(tmp_path, monkeypatch):
    ours = lease.Lease(tmp_path, 60.0, lost=lambda error: None)
    ours.acquire()
    ours.check()
    assert lease.Lease(tmp_path, 60.0)._claim(2)
    with pytest.raises(LockLost, match="was taken over by process"):
        ours.check()
    ours.release()
    mine = lease.Lease(tmp_path / "other", 60.0, lost=lambda error: None)
    (tmp_path / "other").mkdir()
    mine.acquire()
    now = lease._now()
    monkeypatch.setattr(lease, "_now", lambda: now + 46)
    with pytest.raises(LockLost, match="could not be renewed for 45 s"):
        mine.check()
    mine.release()


def test_a_ledger_that_others_have_open_by_the_locks_of_the_kernel_is_not_opened_by_a_lease(tmp_path, monkeypatch):
    """They do not see the locks of a lease. Their last connection would write its log over what came after it."""
    monkeypatch.setattr(sqlite_files, "STILL", 0.2)
    other = Store(tmp_path)
    other.event("kept", "one")
    (tmp_path / ".lease").mkdir()
    with pytest.raises(LedgerError, match="locked"):
        Store(tmp_path)
    page = View(tmp_path, load(TINY, ["run.locks=flock"]), dict)
    with pytest.raises(LedgerError, match="not open yet"):
        page.store  # noqa: B018
    other.close()
    store = Store(tmp_path)
    store.event("kept", "two")
    assert [row["text"] for row in store.events()] == ["one", "two"]
    store.close()


def test_a_ledger_with_a_log_goes_on_by_a_lease_and_back(tmp_path):
    def work(locks: str) -> tuple[int, str]:
        with RunLock(tmp_path, locks, 60.0) as lock:
            store, other = Store(tmp_path, lock), Store(tmp_path)
            other.submit("pause", {}, "cli")  # the command line gives its orders beside the runner
            store.event("step", locks)
            assert len(other.pending()) == len(store.events()) - len([e for e in store.events() if e["kind"] == "step"])
            (mode,) = store.query("PRAGMA journal_mode")
            other.close()
            store.close()
            assert lock.runner is not None
            return lock.runner.token, mode["journal_mode"]

    assert [work(locks) for locks in ("flock", "lease", "lease", "flock")] == [
        (1, "wal"), (2, "truncate"), (3, "truncate"), (4, "wal")
    ]  # fmt: skip
    assert not (tmp_path / ".lease").exists()


def test_a_ledger_that_the_doctor_makes_in_a_folder_with_a_lease_needs_no_locks(tmp_path):
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".ledger.partial").mkdir()
    Store(tmp_path / ".ledger.partial").close()
    assert not (tmp_path / ".ledger.partial" / ".ledger.lock").exists()


def test_a_lock_that_a_killed_process_left_on_the_ledger_is_broken_by_the_next_runner(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_files, "STILL", 0.3)
    with RunLock(tmp_path, "lease", 60.0) as lock:
        Store(tmp_path, lock).close()
    where = sqlite_files.uri(tmp_path / "ledger.sqlite")
    killed = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], uri=True); c.execute('BEGIN IMMEDIATE'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed, where]).returncode == -signal.SIGKILL
    assert (tmp_path / "ledger.sqlite.lock").is_dir()
    with RunLock(tmp_path, "lease", 60.0) as lock:
        store = Store(tmp_path, lock)
        store.event("step", "x")
        store.close()
    assert not (tmp_path / "ledger.sqlite.lock").exists()


def test_without_waiting_a_look_says_who_has_claimed_the_folder(tmp_path):
    with RunLock(tmp_path, "lease", 60.0) as lock:
        store = Store(tmp_path, lock)
        os.close(lock._file)  # as on a file system without locks
        os.close(lock._folder)
        lock._file = lock._folder = None
        with pytest.raises(InUseError, match="is claimed by process"):
            RunLock(tmp_path, "lease").look(store)
        store.close()
    store = Store(tmp_path)
    RunLock(tmp_path, "lease").look(store)
    store.close()


def test_the_current_policy_needs_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "symlink", lambda *_, **__: pytest.fail("there are none on this file system"))
    policies = Policies(tmp_path)
    policies.folder(0).mkdir(parents=True)
    (policies.folder(0) / "manifest.json").touch()
    policies.set_current(0)
    assert policies.current == 0
