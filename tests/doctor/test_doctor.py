"""`selfplay doctor`: what it finds in a run folder, what it mends, and what it leaves to a person."""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from storage_world import finished, flip
from typer.testing import CliRunner

from selfplay.cli import app
from selfplay.doctor.look import look
from selfplay.errors import DamagedError, InputError
from selfplay.prompts import sealing
from selfplay.publishing import scratch
from selfplay.storage import agreement, closed, retention, seals
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.policies import Policies


@pytest.fixture
def run_dir(tmp_path):
    return finished(tmp_path / "run", rounds=3)


def doctor(run_dir: Path, *words: str, said: str = "") -> tuple[int, str]:
    found = CliRunner().invoke(app, ["doctor", str(run_dir), *words], input=said, env={"COLUMNS": "250"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


def ledger(run_dir: Path) -> dict[str, list[tuple]]:
    """What the ledger has, but for times."""
    connection = sqlite3.connect(run_dir / "ledger.sqlite")
    names = ("runs", "rounds", "policies", "metrics", "pairs", "row_hashes")
    found = {name: connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in names}
    found["current"] = connection.execute(
        "SELECT json_extract(value, '$.version') FROM state WHERE name = 'current'"
    ).fetchall()
    found["stages"] = connection.execute("SELECT round, stage, seconds FROM stages ORDER BY 1, 2").fetchall()
    connection.close()
    lost = ("state", "totals")  # what is kept under names, and how many events there were, is not in the folder
    found["row_hashes"] = [row[:2] for row in found["row_hashes"] if row[0] not in lost]
    return found


def test_a_whole_folder_has_nothing_wrong(run_dir):
    assert doctor(run_dir) == (0, f"{run_dir}: nothing is wrong\n")


def test_a_folder_that_is_none_or_in_use_is_refused(run_dir, tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        doctor(tmp_path / "nothing")
    with RunLock(run_dir), pytest.raises(InputError, match="in use"):
        doctor(run_dir)


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "a page is overwritten", "a row is changed"])
def test_a_ledger_is_made_again_from_the_folder_as_it_was(run_dir, how):
    path, before = run_dir / "ledger.sqlite", ledger(run_dir)
    store = Store(run_dir)
    store.pin(1, True)
    closed.write(run_dir / "rounds" / "0003", store, 3, state="promoted", policy=3, reasons=[])
    store.close_round(3, "promoted", 3, [])
    store.close()
    before = ledger(run_dir)
    if how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    elif how == "a page is overwritten":
        content = bytearray(path.read_bytes())
        content[8192 : 8192 + 4096] = bytes(4096)
        path.write_bytes(content)
    else:
        other = sqlite3.connect(path)
        other.execute("UPDATE policies SET pinned = 0")
        other.commit()
        other.close()
    code, said = doctor(run_dir)
    assert code == 3 and "ledger.sqlite" in said and "(by doctor)" in said
    code, said = doctor(run_dir, "--yes")
    assert (code, "mended: 1 of 1" in said) == (0, True), said
    after = ledger(run_dir)
    for name, rows in before.items():
        assert [r[:3] + r[4:] for r in after[name]] == [r[:3] + r[4:] for r in rows], name
    store = Store(run_dir)
    agreement.require(store, run_dir, lambda kind, text: pytest.fail(text))
    assert store.policy(1)["pinned"] and store.events()[-1]["kind"] == "repaired"
    store.close()


def test_a_ledger_is_made_again_with_rounds_that_were_given_up_at_once_and_what_retention_has_deleted(run_dir):
    store = Store(run_dir)
    store.open_round(4, 3, (0, 12), "f" * 64, {"run": {"name": "tiny", "seed": 0}})
    closed.write(run_dir / "rounds" / "0004", store, 4, state="cancelled", policy=3, reasons=[])
    store.close_round(4, "cancelled", 3, [])
    retention.delete_candidates(run_dir, store, 2)
    store.close()
    (run_dir / "ledger.sqlite").unlink()
    assert doctor(run_dir, "--yes")[0] == 0
    store = Store(run_dir)
    assert store.last_round() == 4 and retention.deleted(store) == {retention.CANDIDATES: 2}
    store.close()


def test_a_damaged_ledger_stays_where_the_folder_does_not_say_enough_for_another(run_dir):
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute("UPDATE policies SET pinned = 1")
    other.commit()
    other.close()
    flip(run_dir / "policies" / "0001" / "manifest.json", 30)
    with pytest.raises(DamagedError, match="0001"):
        doctor(run_dir, "--yes")
    store = Store(run_dir)
    assert store.last_round() == 3
    store.close()


def test_what_is_made_again_is_for_the_owner_of_the_run_alone(run_dir):
    (run_dir / "ledger.sqlite").unlink()
    before = os.umask(0o022)
    try:
        assert doctor(run_dir, "--yes")[0] == 0
    finally:
        os.umask(before)
    assert (run_dir / "ledger.sqlite").stat().st_mode & 0o777 == 0o600


def test_nothing_is_changed_without_a_yes(run_dir):
    (run_dir / "current").unlink()
    code, said = doctor(run_dir, said="n\n")
    assert code == 3 and "current" in said and not (run_dir / "current").is_symlink()
    code, said = doctor(run_dir, said="y\n")
    assert code == 0 and Policies(run_dir).current == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("policies/0002/model.safetensors", "put the folder back from a copy"),
        ("policies/0003/manifest.json", "selfplay rollback"),
        ("rounds/0001/score/rows.txt", "later rounds go on without it"),
        ("rounds/0002/generate/manifest.json", "put it back from a copy"),
    ],
)
def test_what_cannot_be_made_again_is_named_and_left_alone(run_dir, name, words):
    flip(run_dir / name, 3)
    damaged = (run_dir / name).read_bytes()
    code, said = doctor(run_dir, "--yes")
    assert code == 3 and words in said and name.rpartition("/")[0] in said
    assert (run_dir / name).read_bytes() == damaged


def test_the_record_of_a_round_is_written_again_and_leftovers_go(run_dir):
    flip(run_dir / "rounds" / "0002" / "closed.json", 30)
    (run_dir / "rounds" / "0003" / ".train.partial").mkdir()
    (run_dir / "rounds" / "0003" / "score-1.shards").mkdir()
    (run_dir / ".export-killed" / "model").mkdir(parents=True)
    (run_dir / ".publish").mkdir()
    assert len(look(run_dir)) == 5
    with scratch.folder(run_dir) as one, scratch.folder(run_dir) as other:  # the killed one goes, and these are in use
        assert len(look(run_dir)) == 4 and one.is_dir() and other.is_dir()
    assert not one.exists() and not other.exists()
    assert doctor(run_dir, "--yes")[0] == 0 and look(run_dir) == []


def test_a_pool_without_its_manifest_is_named_where_the_ledger_knows_of_one(run_dir):
    manifest = run_dir / "pool" / "manifest.json"
    manifest.unlink()
    assert look(run_dir) == []  # an earlier version has left none
    with contextlib.closing(Store(run_dir)) as store:
        sealing.open_pool(run_dir / "pool", store)
    assert look(run_dir) == []
    manifest.unlink()
    (found,) = look(run_dir)
    assert (found.path, found.what, found.repair) == (manifest, "it is gone", None)
    code, said = doctor(run_dir, "--yes")
    assert code == 3 and "put the folder pool of the run back from a copy" in said and not manifest.exists()


def test_a_damaged_part_that_a_killed_import_left_goes(run_dir):
    folder = run_dir / "pool.parts" / "0123456789abcdef"
    folder.mkdir(parents=True)
    for name in ("000000.facts", "000000.arrow"):
        with seals.whole(folder / name) as partial:
            partial.write_bytes(bytes(100))
    assert look(run_dir) == []
    flip(folder / "000000.arrow", 3)
    assert [found.path.name for found in look(run_dir)] == ["000000.arrow"]
    assert doctor(run_dir, "--yes")[0] == 0 and look(run_dir) == []
    assert sorted(path.name for path in folder.iterdir()) == ["000000.facts", "000000.facts.sha256"]


@pytest.mark.parametrize("name", ["rounds/0002", "policies/0001"])
def test_a_run_goes_on_without_a_folder_that_is_gone_for_good(run_dir, name):
    shutil.rmtree(run_dir / name)
    code, said = doctor(run_dir)
    assert code == 3 and name in said and "the ledger is right" in said and "goes on without it" in said
    assert doctor(run_dir, "--yes")[0] == 0
    store = Store(run_dir)
    agreement.require(store, run_dir, lambda kind, text: pytest.fail(text))
    store.close()


@pytest.mark.parametrize("name", ["rounds", "policies/0000", "policies/0003"])
def test_a_run_does_not_go_on_without_what_it_needs(run_dir, name):
    shutil.rmtree(run_dir / name)
    code, said = doctor(run_dir, "--yes")
    assert code == 3 and "the ledger is right" in said and "goes on without it" not in said


def test_a_damaged_metric_or_sum_costs_no_event(run_dir):
    with contextlib.closing(Store(run_dir)) as store:
        store.event("note", "one")
        before = store.metrics(2), store.count_rounds(), store.totals("stages"), store.events()
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute("UPDATE metrics SET value = 9 WHERE round = 2 AND name = 'score/reward_mean'")
    other.execute("UPDATE totals SET value = 9 WHERE of = 'rounds'")
    other.commit()
    other.close()
    code, said = doctor(run_dir)
    assert code == 3 and "of its table metrics" in said
    code, said = doctor(run_dir, "--yes")
    assert (code, "mended: 1 of 1" in said) == (0, True), said
    with contextlib.closing(Store(run_dir)) as store:
        assert (store.metrics(2), store.count_rounds(), store.totals("stages"), store.events()) == before
    assert doctor(run_dir) == (0, f"{run_dir}: nothing is wrong\n")
