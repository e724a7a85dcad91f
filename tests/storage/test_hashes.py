"""Hashes of files, which are remembered for as long as a file does not change."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from selfplay.errors import CheckpointError
from selfplay.storage import folders, hashes


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that were opened since, in order."""
    found = []
    open_file = Path.open

    def record(self, *args, **kwargs):
        found.append(self.name)
        return open_file(self, *args, **kwargs)

    hashes.forget()
    monkeypatch.setattr(Path, "open", record)
    return found


def of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def write(path, text):
    path.write_text(text)
    os.utime(path, ns=(1_000, 1_000))  # another time than that of any later change
    return path


def test_a_file_that_did_not_change_is_read_once(tmp_path, opened):
    path = write(tmp_path / "a", "one")
    opened.clear()
    assert hashes.sha256(path) == hashes.sha256(path) == of("one")
    assert opened == ["a"]
    hashes.forget()
    assert hashes.sha256(path) == of("one")
    assert opened == ["a", "a"]


def test_a_disk_that_damages_a_file_silently_is_found_within_the_hour(tmp_path, monkeypatch):
    path, clock = write(tmp_path / "weights", "one"), [0.0]
    monkeypatch.setattr(hashes.time, "monotonic", lambda: clock[0])
    hashes.verify_files(tmp_path, {"weights": of("one")}, CheckpointError)
    kept = hashes.identity(path)
    path.write_text("two")
    monkeypatch.setattr(hashes, "identity", lambda of: kept)  # the disk tells nothing of it
    clock[0] = hashes.REMEMBERED - 1
    hashes.verify_files(tmp_path, {"weights": of("one")}, CheckpointError)
    clock[0] = hashes.REMEMBERED + 1
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        hashes.verify_files(tmp_path, {"weights": of("one")}, CheckpointError)


def test_a_file_in_a_renamed_folder_is_not_read_again(tmp_path, opened):
    """A stage is hashed in the folder where it works, which then gets its name."""
    with folders.folder(tmp_path / "stage") as partial:
        write(partial / "rows", "one")
        found = hashes.hash_files(partial)
    opened.clear()
    hashes.verify_files(tmp_path / "stage", found, CheckpointError)
    assert opened == []


def test_a_file_that_changed_is_read_again(tmp_path, opened):
    path = write(tmp_path / "a", "one")
    before = hashes.sha256(path)
    path.write_text("two")
    assert hashes.sha256(path) == of("two") != before
    write(path, "two")
    assert hashes.sha256(path) == of("two")
    time.sleep(0.05)  # longer than the kernel's clock of files stands still
    assert hashes.sha256(write(path, "six")) == of("six"), "the size and the time of before"
    path.write_text("two")
    os.link(path, tmp_path / "b")
    path.unlink()
    assert hashes.sha256(write(path, "six")) == of("six")
    assert hashes.sha256(tmp_path / "b") == of("two")


def test_several_files_are_hashed_in_their_order_and_each_is_read_once(tmp_path, opened):
    paths = [write(tmp_path / f"f{i}", str(i)) for i in range(20)]
    hashes.sha256(paths[7])
    opened.clear()
    assert hashes.sha256_of(reversed(paths)) == [of(str(i)) for i in reversed(range(20))]
    assert sorted(opened) == sorted(f"f{i}" for i in range(20) if i != 7)
    assert hashes.sha256_of(iter(paths[:2])) == [of("0"), of("1")]
    assert len(opened) == 19
    assert hashes.sha256_of([]) == []


def test_of_more_files_than_are_remembered_each_is_read_once_a_time_all_the_same(tmp_path, monkeypatch, opened):
    monkeypatch.setattr(hashes, "MOST_REMEMBERED", 3)
    paths = [write(tmp_path / f"f{i:02d}", str(i)) for i in range(40)]
    opened.clear()
    assert hashes.sha256_of(paths) == [of(str(i)) for i in range(40)]
    assert sorted(opened) == [path.name for path in paths]
    for _ in range(5):
        assert hashes.hash_files(tmp_path) == {f"f{i:02d}": of(str(i)) for i in range(40)}


def test_the_files_of_a_folder_are_named_from_it_and_its_manifest_is_left_out(tmp_path):
    (tmp_path / "masters").mkdir()
    for name in ("a", "masters/a", folders.MANIFEST, "masters/manifest.json"):
        write(tmp_path / name, name)
    names = ("a", "masters/a", "masters/manifest.json")
    assert hashes.hash_files(tmp_path) == {name: of(name) for name in names}
    assert list(hashes.hash_files(tmp_path, ignore=())) == sorted([*names, folders.MANIFEST])


def test_the_first_file_that_is_not_what_its_hash_says_is_named(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / name, name)
    files = hashes.hash_files(tmp_path)
    hashes.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "b").write_text("x")
    (tmp_path / "c").write_text("x")
    with pytest.raises(CheckpointError, match=r"/b is not what its manifest says \(SHA-256 differs\)"):
        hashes.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "c").unlink()
    with pytest.raises(CheckpointError, match="/c is missing"):
        hashes.verify_files(tmp_path, files, CheckpointError)
