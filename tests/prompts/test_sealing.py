"""Hashes of a pool: what the importer wrote, and what joined later."""

import contextlib
import json
import sqlite3
import time

import pytest
from steps_world import LINE, Opened
from storage_world import flip

from selfplay.errors import DamagedError
from selfplay.prompts import pool, sealing
from selfplay.storage import folders, hashes, seals
from selfplay.storage.ledger import Store
from selfplay.types import Prompt


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pool"
    (made / "prompts").mkdir(parents=True)
    (made / "prompts" / "000000000.arrow").write_bytes(bytes(100))
    (made / "initial.json").write_text(json.dumps({"source": "x"}))
    sealing.seal(made)
    for number in range(2):
        prompt = Prompt(prompt_id=f"{number:016x}", messages=[], prompt_ids=[1], split="train", joined=1)
        pool.write_added(made, [prompt])
    return made


@pytest.mark.parametrize(
    "name",
    ["prompts/000000000.arrow", "initial.json", "manifest.json", "added/0001.parquet", "added/0002.parquet.sha256"],
)
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_pool_stops_the_run_and_is_named(folder, name, how):
    sealing.require_whole(folder)
    path = folder / name
    if how == "flip":
        flip(path, 12)
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedError, match=name.removesuffix(seals.BESIDE)) as error:
        sealing.require_whole(folder)
    assert "back from a copy" in error.value.hint


@pytest.mark.parametrize("name", ["prompts/000000000.arrow", "added/0001.parquet"])
def test_what_is_damaged_while_a_run_is_open_is_seen_and_nothing_else_is_read_again(folder, name, monkeypatch):
    steps = Opened(folder.parent / "run").steps()
    folder = folder.rename(steps.run.dir / "pool")
    sealing.require_whole(folder)
    sealing.require_whole(folder, anew=False)
    read, digest = [], hashes.digest
    monkeypatch.setattr(hashes, "digest", lambda path: read.append(path) or digest(path))
    sealing.require_whole(folder, anew=False)
    assert read == []
    time.sleep(0.05)  # longer than the kernel's clock of files stands still
    flip(folder / name, 12)
    with pytest.raises(DamagedError, match=name):
        steps.prompts(folder, LINE)  # before it draws
    assert read == [folder / name]


def test_a_file_that_is_gone_is_named(folder):
    (folder / "added" / "0001.parquet").unlink()
    (folder / "prompts" / "000000000.arrow").unlink()
    assert [path.name for path, _ in sealing.damaged(folder)] == ["000000000.arrow", "0001.parquet"]


@pytest.fixture
def store(tmp_path):
    (tmp_path / "ledger").mkdir()
    with contextlib.closing(Store(tmp_path / "ledger")) as opened:
        yield opened


def with_a_round(store):
    store.open_round(1, 0, (0, 0), "f" * 64, {})


def test_a_pool_of_an_earlier_version_gets_its_hashes(folder, store):
    """The initial policy may be in it still, where a kill came before it had its place among the run's."""
    with_a_round(store)
    (folder / folders.MANIFEST).unlink()
    (folder / pool.POLICY).mkdir()
    (folder / pool.POLICY / "model.safetensors").write_bytes(bytes(8))
    sealing.open_pool(folder, store)
    (folder / pool.POLICY).rename(folder.parent / "0000")
    assert sealing.damaged(folder, known=store.state(sealing.STATE)) == []
    sealing.open_pool(folder, store)


def test_a_manifest_that_is_gone_is_named_once_the_ledger_knows_it(folder, store):
    sealing.open_pool(folder, store)
    content = (folder / folders.MANIFEST).read_bytes()
    (folder / folders.MANIFEST).unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged: it is gone") as error:
        sealing.open_pool(folder, store)
    assert "back from a copy" in error.value.hint and not (folder / folders.MANIFEST).exists()
    (folder / folders.MANIFEST).write_bytes(content)
    sealing.open_pool(folder, store)


def test_a_manifest_that_is_lost_while_a_run_is_open_is_not_made_of_what_is_there(folder):
    steps = Opened(folder.parent / "run").steps()
    folder = folder.rename(steps.run.dir / "pool")
    (folder / folders.MANIFEST).unlink()
    with pytest.raises(DamagedError, match="it is gone"):
        steps.prompts(folder, LINE)
    assert not (folder / folders.MANIFEST).exists()


def test_the_pool_of_another_run_is_named(folder, store):
    """All its files are what its own manifest says."""
    sealing.open_pool(folder, store)
    (folder / "prompts" / "000000000.arrow").write_bytes(bytes(99))
    sealing.seal(folder)
    with pytest.raises(DamagedError, match=r"manifest\.json is damaged: it is that of another pool"):
        sealing.open_pool(folder, store)
    (found,) = sealing.damaged(folder, known=store.state(sealing.STATE))
    assert found == (folder / folders.MANIFEST, sealing.ANOTHER)


def test_a_damaged_row_of_the_ledger_is_not_blamed_on_the_pool(folder, store):
    sealing.open_pool(folder, store)
    with contextlib.closing(sqlite3.connect(store.path)) as other:
        other.execute("UPDATE state SET value = '\"0\"' WHERE name = 'pool'")
        other.commit()
    sealing.open_pool(folder, store)
    assert "pool" in str(store.damaged_rows()[0])  # which stops the run when folder and ledger are compared
    (folder / folders.MANIFEST).unlink()
    with pytest.raises(DamagedError, match="it is gone"):
        sealing.open_pool(folder, store)


def test_a_pool_that_is_gone_is_imported_anew_only_where_no_round_has_drawn_from_it(folder, store):
    assert not sealing.begins(folder, store)
    sealing.open_pool(folder, store)
    folder.rename(folder.with_name("before"))
    assert sealing.begins(folder, store) and store.state(sealing.STATE) is None
    with_a_round(store)
    with pytest.raises(DamagedError, match="pool is damaged: it is gone") as error:
        sealing.begins(folder, store)
    assert "back from a copy" in error.value.hint


def test_a_join_that_was_killed_before_its_file_had_its_name_is_no_damage(folder):
    """The hash is written first: a kill between the two leaves it, and a file with a name that does not count."""
    (folder / "added" / "0002.parquet").rename(folder / "added" / ".0002.parquet.partial")
    sealing.require_whole(folder)
    pool.write_added(folder, [Prompt(prompt_id="f" * 16, messages=[], prompt_ids=[1], split="train", joined=2)])
    sealing.require_whole(folder)
    assert sorted(path.name for path in (folder / "added").glob("*.parquet")) == ["0001.parquet", "0002.parquet"]
