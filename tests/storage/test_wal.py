"""The write-ahead log of a ledger after a kill: SQLite drops what follows a damaged frame without a word."""

import shutil
import sqlite3
import struct

import pytest
from storage_world import finished, flip

from selfplay.errors import InputError
from selfplay.storage import wal
from selfplay.storage.ledger import Store


@pytest.fixture
def run_dir(tmp_path):
    """A folder as a kill leaves it: ten states were written that are in the write-ahead log alone."""
    run_dir = finished(tmp_path / "run", rounds=1)
    store = Store(run_dir)
    for number in range(10):
        store.set_state("number", number)
    killed = shutil.copytree(run_dir, tmp_path / "killed", symlinks=True)
    store.close()
    return killed


def test_a_whole_log_is_whole(run_dir):
    path = run_dir / "ledger.sqlite-wal"
    assert path.stat().st_size > 50_000 and wal.damage(path) is None
    assert wal.damage(run_dir / "no-wal") is None
    store = Store(run_dir)
    assert store.state("number") == 9
    store.close()


def test_what_was_committed_last_is_missed_too(run_dir):
    path, index = run_dir / "ledger.sqlite-wal", run_dir / "ledger.sqlite-shm"
    whole, indexed = path.read_bytes(), index.read_bytes()
    for left in (len(whole) - 1, len(whole) // 2, 32, 0):
        path.write_bytes(whole[:left])
        with pytest.raises(InputError, match="ledger.sqlite-wal is damaged: .* frames"):
            Store(run_dir)
    path.unlink()
    with pytest.raises(InputError, match="ledger.sqlite-wal is damaged: it is gone"):
        Store(run_dir)
    path.write_bytes(whole)
    for byte in (2, 8, 40):  # one that was being changed, or is no index, says nothing
        flip(index, byte)
        assert wal.damage(path) is None
        index.write_bytes(indexed)
    Store(run_dir).close()
    assert wal.damage(path) is None


def test_every_damage_before_the_last_transaction_stops_the_run(run_dir):
    """Also where the log's index is gone, as after a power cut."""
    path = run_dir / "ledger.sqlite-wal"
    (run_dir / "ledger.sqlite-shm").unlink()
    whole = path.read_bytes()
    page = struct.unpack(">8I", whole[:32])[2]
    frame = 24 + page
    frames = (len(whole) - 32) // frame
    for place in (2, 9, 18, 30, 32 + 5, 32 + 9, 32 + 20, 32 + 24 + 99, 32 + (frames // 2) * frame + 700):
        flip(path, place)
        with pytest.raises(InputError, match="ledger.sqlite-wal is damaged"):
            Store(run_dir)
        path.write_bytes(whole)
    flip(path, 32 + (frames - 1) * frame + 30)
    store = Store(run_dir)
    assert store.state("number") == 8  # as after a power cut before the last one was synced
    store.close()


def test_sqlite_itself_says_nothing(run_dir):
    """Why the file is looked at: a damaged frame in the middle takes half of the transactions with it."""
    path = run_dir / "ledger.sqlite-wal"
    flip(path, path.stat().st_size // 2)
    connection = sqlite3.connect(run_dir / "ledger.sqlite")
    (number,) = connection.execute("SELECT value FROM state WHERE name = 'number'").fetchone() or ("-1",)
    assert int(number) < 8
    connection.close()
