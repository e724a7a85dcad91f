"""File systems that lack what a run needs: the calls fail as they do on NFS without locks, SMB, and mounts of object stores."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from selfplay.errors import InputError
from selfplay.storage import filesystem
from selfplay.storage.lock import RunLock


def test_a_local_disk_has_it_all_and_nothing_is_left_behind(tmp_path):
    assert filesystem.lacks(tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "call", "number", "words"),
    [
        (fcntl, "flock", errno.ENOLCK, "locks of files (flock), which keep a second process out of a run (No locks available)"),
        (fcntl, "lockf", errno.EOPNOTSUPP, "locks of bytes (fcntl)"),
        (os, "symlink", errno.EPERM, "symbolic links that are replaced in one step, as `current` is (Operation not permitted)"),
        (os, "rename", errno.ENOTSUP, "renames of folders"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch, module, call, number, words):
    def fails(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(module, call, fails)
    assert any(words in each for each in filesystem.lacks(tmp_path))
    with (
        pytest.raises(InputError, match="cannot be a run folder: its file system has no") as error,
        RunLock(tmp_path / "run"),
    ):
        pass
    assert "local disk" in error.value.hint and not any(Path(tmp_path / "run").iterdir())


def test_what_was_left_by_a_kill_during_the_trial_is_deleted_by_who_holds_the_lock(tmp_path):
    (tmp_path / f"{filesystem.SCRATCH}left" / "whole").mkdir(parents=True)
    with RunLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
