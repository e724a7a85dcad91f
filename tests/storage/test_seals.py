"""Hashes that files and rows carry: one flipped bit is found, and what can be made again counts as absent."""

import contextlib
import json
import sqlite3
import struct
import tarfile

import pyarrow as pa
import pytest
from mini import ROOT
from storage_world import finished, flip

from selfplay.errors import DamagedError, InputError
from selfplay.storage import agreement, hashed_rows, manifests, seals, tables
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.types import ReferenceLogp


def test_a_sealed_mapping_is_read_and_any_other_is_not(tmp_path):
    path = tmp_path / "a.json"
    seals.write_json(path, {"beta": 0.1, "files": {"a": "b"}, "steps": (1, 2)})
    assert seals.read_json(path, ()) == {"beta": 0.1, "files": {"a": "b"}, "steps": [1, 2]}
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            flip(path, place, bit)
            with contextlib.suppress(DamagedError):
                found = seals.read_json(path, ("beta", "files", "steps"))
                assert found == {"beta": 0.1, "files": {"a": "b"}, "steps": [1, 2]}, (place, bit)  # white space
            path.write_bytes(whole)


def test_a_mapping_of_an_earlier_version_has_no_hash(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"beta": 0.1}))
    assert seals.read_json(path, ("beta",)) == {"beta": 0.1}
    with pytest.raises(DamagedError):
        seals.read_json(path, ("epsilon",))


@pytest.mark.parametrize("damage", ["flip", "cut", "hash"])
def test_a_damaged_shard_counts_as_absent_and_is_told(tmp_path, damage):
    path = tmp_path / "0.parquet"
    seals.repairs()  # of other tests in this process
    tables.write_table(path, pa.table({"logp": [0.5, 1.5]}))
    assert seals.is_whole(path) and seals.repairs() == []
    if damage == "flip":
        flip(path, 9)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        flip(seals.beside(path), 5)
    assert not seals.is_whole(path) and not path.exists() and not seals.beside(path).exists()
    (said,) = seals.repairs()
    assert str(path) in said


def test_shards_of_an_earlier_version_count_as_they_were_when_the_first_one_was_sealed(tmp_path):
    """Those of the recorded run, whose round goes on with this version."""
    with tarfile.open(ROOT / "tests" / "recorded" / "flat-modules.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (tmp_path / "run" / "rounds" / "0002").glob("generate-*.shards")
    first, second = sorted(folder.glob("*.parquet"))
    assert all(map(seals.is_whole, (first, second)))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # killed at the first one
        patch.setattr(seals, "beside", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        tables.write_table(folder / "00000016.parquet", pa.table({"logp": [0.5]}))
    assert all(map(seals.is_whole, (first, second)))
    tables.write_table(folder / "00000016.parquet", pa.table({"logp": [0.5]}))
    assert all(map(seals.is_whole, folder.glob("*.parquet")))
    flip(first, 40)
    seals.beside(folder / "00000016.parquet").unlink()  # lost in a power cut
    seals.repairs()  # of other tests in this process
    assert [path.name for path in sorted(folder.glob("*.parquet")) if seals.is_whole(path)] == [second.name]
    assert len(seals.repairs()) == 2


def test_a_page_that_is_not_what_its_checksum_says_is_named_wherever_it_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    tables.write_rows(
        path, [ReferenceLogp(prompt_id=f"{i:04d}", index=0, logp=-i / 7) for i in range(64)], ReferenceLogp
    )
    flip(path, 40)
    for read in (
        lambda: tables.read_rows(path, ReferenceLogp),
        lambda: tables.read_table(path, ["prompt_id", "logp"]),
        lambda: list(tables.rows_with(path, ReferenceLogp, "prompt_id", {"0001"})),
        lambda: tables.read_whole(path),
        lambda: tables.RowReader(path, ["prompt_id"], ReferenceLogp).take([3]),
    ):
        with pytest.raises(DamagedError, match=r"rows.parquet is damaged"):
            read()


def test_a_file_of_an_earlier_round_is_read_only_as_its_manifest_has_it(tmp_path):
    run_dir = finished(tmp_path / "run", rounds=1)
    path = run_dir / "rounds" / "0001" / "score" / "rows.txt"
    assert manifests.require_whole(path) == path
    path.write_text("score 2")
    with pytest.raises(DamagedError, match="is not what .*manifest.json says") as error:
        manifests.require_whole(path)
    assert "doctor" in error.value.hint


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE policies SET pinned = 1 WHERE version = 2",
        "UPDATE policies SET beta = 0.5 WHERE version = 1",
        "UPDATE rounds SET policy = 1 WHERE round = 2",
        "UPDATE state SET value = '{\"version\": 1, \"before\": 0}' WHERE name = 'current'",
        "UPDATE runs SET created = '2020-01-01'",
        "DELETE FROM policies WHERE version = 1",
        "INSERT INTO state VALUES ('pause', 'null')",
        "UPDATE orders SET arguments = '{\"version\": 3}'",
        "DELETE FROM orders",
        "UPDATE totals SET value = 1 WHERE of = 'rounds' AND name = 'promoted'",
        "UPDATE metrics SET value = 0.75 WHERE name = 'evaluate/reward' AND round = 2",
        "DELETE FROM metrics WHERE name = 'score/reward_mean' AND round = 1",
        "DELETE FROM draws WHERE round = 1",
        "UPDATE metrics SET value = 0.75 WHERE round = 1",  # the policy that serves may be an old one
    ],
)
def test_a_row_that_was_changed_by_other_hands_stops_the_run(tmp_path, change):
    run_dir = finished(tmp_path / "run", rounds=2)
    with contextlib.closing(Store(run_dir)) as store:
        store.submit("rollback", {"version": 1}, "cli")
        store.record_metrics(1, "score", {"reward_mean": 0.25})
        store.record_metrics(2, "evaluate", {"reward": 0.5})
        store.record_draw(1, 0, 4, b"levels")
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute(change)
    other.commit()
    other.close()
    store = Store(run_dir)
    with pytest.raises(InputError, match=r"ledger.sqlite: it is damaged: the row .* is not what was written"):
        agreement.require(store, run_dir, lambda kind, text: None)
    store.close()


def test_rows_that_the_run_writes_keep_their_hashes(tmp_path):
    run_dir = finished(tmp_path / "run", rounds=2)
    store = Store(run_dir)
    store.pin(1, True)
    store.weights_deleted([1])
    store.set_state("pause", {"why": "x"})
    store.set_state("pause", None)
    store.record_draw(2, 0, 4, b"levels")
    store.record_draw(2, 0, 4, b"others")
    store.change_config(2, "g", {"a": 1})
    store.event("note", "one")
    store.record_stage(2, "evaluate", 1.5, {"reward": 0.5, "tokens": 12, "ties": 3})
    store.record_stage(2, "evaluate", 2.5, {"reward": 0.25, "tokens": 11})
    order = store.submit("rollback", {"version": 1}, "cli")
    store.answer(order, "done", "policy 1 serves")
    store.delete_events(keep=1, most=100)
    assert store.damaged_rows(every=True) == []
    store.close()


def test_a_ledger_that_had_no_hashes_of_orders_gets_them(tmp_path):
    run_dir = finished(tmp_path / "run", rounds=1)
    with contextlib.closing(Store(run_dir)) as store:
        store.submit("rollback", {"version": 1}, "cli")
        store.record_metrics(1, "evaluate", {"reward": 0.5})
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute("DELETE FROM row_hashes WHERE of IN ('orders', 'totals', 'metrics')")
    other.execute("UPDATE schema_version SET version = 7")
    other.execute("UPDATE policies SET beta = 0.5 WHERE version = 1")  # which was hashed before, and is not hashed anew
    other.commit()
    other.close()
    with contextlib.closing(Store(run_dir)) as store:
        store.event("note", "one")
        assert [*map(str, store.damaged_rows(every=True))] == ["the row 1 of its table policies"]


def test_a_version_that_was_damaged_hashes_nothing_anew(tmp_path):
    run_dir = finished(tmp_path / "run", rounds=1)
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute("UPDATE schema_version SET version = 0")
    other.execute("UPDATE policies SET beta = 0.5 WHERE version = 1")
    other.commit()
    other.close()
    with contextlib.closing(Store(run_dir)) as store:
        assert "the row 1 of its table policies" in map(str, store.damaged_rows())


def test_what_a_runner_of_an_earlier_version_wrote_after_the_migration_is_no_damage(tmp_path):
    """`selfplay status` migrates the ledger while an older service works on, whose connections keep fewer hashes."""
    run_dir = finished(tmp_path / "run", rounds=1)
    with RunLock(run_dir) as lock, contextlib.closing(Store(run_dir, lock)) as store:
        order = store.submit("rollback", {"version": 1}, "cli")
    older = sqlite3.connect(run_dir / "ledger.sqlite")  # it has no triggers of ours
    (found,) = older.execute("SELECT value FROM state WHERE name = 'runner'").fetchone()
    runner = json.loads(found)
    del runner["ledger"]
    hashed_rows.prepare(older)  # as a runner keeps the hashes of its own record
    older.execute("UPDATE state SET value = ? WHERE name = 'runner'", (json.dumps(runner),))
    older.commit()
    older.close()
    older = sqlite3.connect(run_dir / "ledger.sqlite")
    older.execute("UPDATE orders SET state = 'done' WHERE id = ?", (order,))
    older.execute("UPDATE totals SET value = value + 1 WHERE of = 'stages'")
    older.commit()
    older.close()
    with contextlib.closing(Store(run_dir)) as store:
        assert store.damaged_rows()
    with RunLock(run_dir) as lock, contextlib.closing(Store(run_dir, lock)) as store:
        assert store.damaged_rows(every=True) == []


@pytest.mark.parametrize(
    ("name", "value", "damaged"),
    [
        ("orders", b"pending", "the row 1 of its table orders"),
        ("ix_orders_state", b"pending", "the row 1 of its table orders"),
        ("metrics", struct.pack(">d", 0.3137), "the row 1 evaluate/reward of its table metrics"),
        ("metrics_by_name", struct.pack(">d", 0.3137), "the row 1 evaluate/reward of its table metrics"),
    ],
)
def test_a_bit_in_a_table_or_in_the_index_that_is_read_instead_is_damage(tmp_path, name, value, damaged):
    run_dir = finished(tmp_path / "run", rounds=1)
    with contextlib.closing(Store(run_dir)) as store:
        store.submit("rollback", {"version": 1}, "cli")
        store.record_metrics(1, "evaluate", {"reward": 0.3137})
    other = sqlite3.connect(run_dir / "ledger.sqlite")
    other.execute("PRAGMA journal_mode=DELETE")
    (page,) = other.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    (size,) = other.execute("PRAGMA page_size").fetchone()
    other.close()
    path = run_dir / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    at = content.index(value, (page - 1) * size, page * size)
    content[at + 4] ^= 2
    path.write_bytes(content)
    with contextlib.closing(Store(run_dir)) as store:
        assert damaged in map(str, store.damaged_rows())
