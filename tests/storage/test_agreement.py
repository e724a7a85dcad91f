"""Folder and ledger of a run: what happens where they do not tell the same."""

import dataclasses
import errno
import shutil
import sqlite3
from pathlib import Path

import pytest
from storage_world import finished

from selfplay.errors import InputError
from selfplay.storage import agreement, folders, policies
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.reader import CURRENT


@pytest.fixture
def run_dir(tmp_path):
    """A run of three promoted rounds, of which the folders hold manifests and nothing else."""
    return finished(tmp_path / "run", rounds=3)


def opened(run_dir: Path) -> list[str]:
    """What a run says of the agreement when it opens the folder."""
    said: list[str] = []
    store = Store(run_dir)
    try:
        agreement.require(store, run_dir, lambda kind, text: said.append(f"{kind}: {text}"))
    finally:
        store.close()
    return said


def refused(run_dir: Path) -> str:
    with pytest.raises(InputError) as error:
        opened(run_dir)
    assert "selfplay doctor" in error.value.hint
    return f"{error.value}; {error.value.hint}"


def test_folder_and_ledger_that_agree_are_left_alone(run_dir):
    assert opened(run_dir) == [] and Policies(run_dir).current == 3


def test_a_run_that_begins_gets_policy_0_and_nothing_is_told_of_a_repair(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(agreement, "set_current", lambda *_: None)
        run_dir = finished(tmp_path / "new", rounds=0)  # as the import leaves it
    assert not (run_dir / "current").exists()
    assert opened(run_dir) == [] and Policies(run_dir).current == 0


@pytest.mark.parametrize("damage", ["lost", "file", "folder", "to nothing"])
def test_a_lost_current_is_made_again_from_the_ledger(run_dir, damage):
    current = run_dir / "current"
    current.unlink()
    if damage == "file":
        current.write_text("policy three")
    elif damage == "folder":
        shutil.copytree(run_dir / "policies" / "0003", current)
    elif damage == "to nothing":
        current.symlink_to("elsewhere")
    (said,) = opened(run_dir)
    assert said.startswith("repaired: ") and "names policy 3 again" in said
    assert current.read_text() == "3\n" and opened(run_dir) == []


def test_a_current_that_its_writer_did_not_come_to_is_set(run_dir):
    """The ledger says it first, so a kill in between leaves the link at the policy of before."""
    store = Store(run_dir)
    store.set_state(CURRENT, {"version": 1, "before": 3})
    store.close()
    (said,) = opened(run_dir)
    assert "it names policy 3" in said and Policies(run_dir).current == 1


def test_what_a_killed_writer_of_current_left_is_deleted(run_dir):
    left = run_dir / ".current.partial"
    left.write_text("3")
    assert opened(run_dir) == [] and not left.exists()


def test_a_current_that_a_full_disk_kept_behind_is_set_after_a_kill_all_the_same(run_dir, monkeypatch):
    store, policies = Store(run_dir), Policies(run_dir)

    def full(found, version):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Policies, "set_current", full)
    for _ in range(2):  # the stage is tried again, and killed before it comes to the file
        with pytest.raises(OSError, match="full"):
            agreement.set_current(store, policies, 1)
    monkeypatch.undo()
    store.close()
    assert "names policy 1 again" in opened(run_dir)[0] and policies.current == 1


def test_a_current_that_leads_elsewhere_stops_the_run_and_the_ledger_is_right(run_dir):
    Policies(run_dir).set_current(1)
    assert "it names policy 1; by the ledger policy 3 serves, and the ledger is right" in refused(run_dir)


def test_a_ledger_of_an_earlier_version_knows_who_serves_by_its_rounds_and_rollbacks(run_dir):
    store = Store(run_dir)
    store.set_state(CURRENT, None)
    assert store.serving() == 3
    store.answer(store.submit("rollback", {"version": 2}, "cli"), "done", "policy 2 is current")
    assert store.serving() == 2
    store.close()
    (run_dir / "current").unlink()
    (said,) = opened(run_dir)
    assert "names policy 2 again" in said


def test_a_round_that_an_earlier_version_promoted_and_was_killed_before_it_closed_keeps_its_policy(run_dir):
    """Of that promotion only the link tells. The stage is done, so the round goes on behind it, and closes."""
    store = Store(run_dir)
    store.set_state(CURRENT, None)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE rounds SET state = 'running', policy = NULL, ended = NULL WHERE round = 3")
    store.close()
    (run_dir / "current").unlink()
    (run_dir / "current").symlink_to("policies/0003")
    assert opened(run_dir) == []
    store = Store(run_dir)
    assert store.serving() == 3
    store.close_round(3, "promoted", 3, [])
    store.close()
    assert opened(run_dir) == [] and Policies(run_dir).current == 3


@pytest.mark.parametrize("gone", ["rounds", "rounds/0002", "policies/0003", "policies/0003/manifest.json"])
def test_what_the_ledger_knows_and_the_folder_lacks_stops_the_run(run_dir, gone):
    path = run_dir / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "is gone" in (text := refused(run_dir)) and "the ledger is right" in text


def test_what_the_folder_has_and_the_ledger_does_not_know_stops_the_run(run_dir):
    shutil.copytree(run_dir / "rounds" / "0003", run_dir / "rounds" / "0004")
    assert "does not know round 4" in refused(run_dir)
    shutil.rmtree(run_dir / "rounds" / "0004")
    shutil.copytree(run_dir / "policies" / "0003", run_dir / "policies" / "0007")
    assert "does not know policy 7" in refused(run_dir)


def test_another_beta_than_the_ledgers_stops_the_run(run_dir):
    path = run_dir / "policies" / "0002" / folders.MANIFEST
    policies.write(path.parent, dataclasses.replace(policies.read(path.parent), beta=0.25))
    assert "β of policy 2 is 0.25 there and 0.09 in the ledger" in refused(run_dir)


@pytest.mark.parametrize("how", ["gone", "empty", "without its write-ahead log"])
def test_no_ledger_is_made_anew_beside_what_a_run_has_done(run_dir, how):
    ledger = run_dir / "ledger.sqlite"
    ledger.unlink()
    if how == "empty":
        ledger.touch()
    elif how != "gone":
        connection = sqlite3.connect(ledger)
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
        assert ledger.stat().st_size
    before = ledger.read_bytes() if ledger.exists() else None
    with pytest.raises(InputError, match="no new ledger is made") as error:
        Store(run_dir)
    assert error.value.exit_code == 2 and "selfplay doctor" in error.value.hint
    assert (ledger.read_bytes() if ledger.exists() else None) == before
