"""File systems that lack what a run needs: the calls fail as they do on NFS without locks, SMB, and mounts of object stores."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
from faulty_world import HAS_COMPILER, Runner

from selfplay.errors import DiskError, InputError
from selfplay.storage import filesystem, folders
from selfplay.storage.lock import RunLock


@pytest.mark.parametrize("locks", ["flock", "lease"])
def test_a_local_disk_has_it_all_and_nothing_is_left_behind(tmp_path, locks):
    assert filesystem.lacks(tmp_path, locks) == [] and list(tmp_path.iterdir()) == []


def refuses(number: int):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.parametrize(
    ("module", "call", "fails", "words", "by_lease"),
    [
        (fcntl, "flock", refuses(errno.ENOLCK), "locks of files (flock), which keep a second process out of a run (No locks available)", True),
        (fcntl, "flock", lambda *_: None, "locks of files (flock), which keep a second process out of a run (two got the same lock)", True),
        (fcntl, "lockf", refuses(errno.EOPNOTSUPP), "locks of bytes (fcntl)", True),
        (filesystem.mmap, "mmap", refuses(errno.ENODEV), "memory that processes share", True),
        (os, "rename", refuses(errno.ENOTSUP), "renames of folders", False),
        (os, "fsync", refuses(errno.ENOSYS), "syncs of files and folders (fsync)", False),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_before_anything_is_written(
    tmp_path, monkeypatch, module, call, fails, words, by_lease
):
    monkeypatch.setattr(module, call, fails)
    for locks in ("flock", "lease"):
        found = filesystem.missing(tmp_path, locks)
        assert (found is not None and words in found[0]) == (locks == "flock" or not by_lease)
    with pytest.raises(InputError, match="cannot be a run folder: the file system of .* has no") as error:
        RunLock(tmp_path / "run").__enter__()
    assert ("run.locks: lease" in error.value.hint) == by_lease and "local disk" in error.value.hint
    assert not any(Path(tmp_path).iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ("flock bytes memory", ["(No locks available)", "(No such device)", "set run.locks: lease"]),
        (
            "fsync rename",
            ["(Function not implemented)", "(Operation not supported)", "put the run folder on a local disk"],
        ),
    ],
)
def test_a_process_ends_with_code_2_where_the_calls_of_the_system_fail(tmp_path, faults, words):
    code, said = Runner(tmp_path / "run", faults=faults).ended()
    assert code == 2 and all(each in said for each in words) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "kind", "hint"),
    [
        (errno.EROFS, InputError, "mounted read-only"),
        (errno.EPERM, InputError, "chattr -i"),
        (errno.EACCES, InputError, "chown -R"),
        (errno.ENOTDIR, InputError, "move the file away"),
        (errno.EOPNOTSUPP, InputError, "local disk"),
        (errno.EIO, DiskError, "the disk or the server"),
        (errno.ESTALE, DiskError, "the disk or the server"),
    ],
)
def test_what_a_file_system_refuses_below_a_run_is_an_error_that_says_what_to_do(
    tmp_path, monkeypatch, number, kind, hint
):
    def fails(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    with pytest.raises(kind) as error, folders.folder(tmp_path / "run" / "stage"):
        monkeypatch.setattr(os, "rename", fails)
    assert hint in error.value.hint and str(tmp_path / "run") in str(error.value)
    with pytest.raises(OSError, match="elsewhere"), folders.disk_errors(tmp_path / "run" / "stage"):
        fails("/elsewhere/file")  # it is for somebody else to say what that means


def test_what_was_left_by_a_kill_during_the_trial_is_deleted_by_who_holds_the_lock(tmp_path):
    (tmp_path / f"{filesystem.SCRATCH}left" / "whole").mkdir(parents=True)
    with RunLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
