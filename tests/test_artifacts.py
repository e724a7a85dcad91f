import errno
import os

import pytest

from selfplay import artifacts
from selfplay.errors import CheckpointError, DiskError
from selfplay.types import Prompt, Scored


def prompt(i):
    return Prompt(
        prompt_id=f"p{i}",
        messages=[{"role": "user", "content": "héllo"}],
        prompt_ids=[1, 2],
        split="train",
        meta={"a": [i]},
    )


def scored(reward):
    return Scored(
        prompt_id="p", index=0, text="x", token_ids=[], logp=-1.5, n_tokens=0, finish_reason="stop", policy=3,
        reward=reward, reward_parts={"total": 0.5},
    )  # fmt: skip


def test_rows_come_back_as_they_went(tmp_path):
    for rows, kind in (([prompt(1), prompt(2)], Prompt), ([scored(0.1), scored(None)], Scored), ([], Scored)):
        artifacts.write_rows(tmp_path / "rows.parquet", rows, kind)
        assert artifacts.read_rows(tmp_path / "rows.parquet", kind) == rows


def test_equal_rows_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        artifacts.write_rows(tmp_path / name, [prompt(i) for i in range(50)], Prompt)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "stage"
    with pytest.raises(RuntimeError), artifacts.folder(target) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    assert not target.exists()
    with artifacts.folder(target) as partial:
        assert list(partial.iterdir()) == []  # what the failed one left is gone
        (partial / "all").write_text("all")
    assert [p.name for p in target.iterdir()] == ["all"]


def test_a_file_that_changed_or_is_gone_is_noticed(tmp_path):
    (tmp_path / "a").write_text("one")
    files = artifacts.hash_files(tmp_path)
    artifacts.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "a").write_text("two")
    with pytest.raises(CheckpointError, match="is not what its manifest says"):
        artifacts.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        artifacts.verify_files(tmp_path, files, CheckpointError)


def test_seeds_depend_on_every_part_and_fit_63_bits():
    seeds = {artifacts.seed(*parts) for parts in [(0, 1, "a"), (0, 1, "b"), (0, 11, "a"), (1, 1, "a"), ("0\x001", "a")]}
    assert len(seeds) >= 4
    assert all(0 <= s < 2**63 for s in seeds)
    assert artifacts.seed(0, 1, "a") == artifacts.seed(0, 1, "a")


def test_too_little_space_is_told_before_a_stage(tmp_path):
    artifacts.require_free(tmp_path, 1)
    with pytest.raises(DiskError, match="free, the next stage needs about"):
        artifacts.require_free(tmp_path, 1 << 60)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), artifacts.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_full_disk_is_a_clear_error_and_what_was_finished_is_kept(small_disk):
    disk = small_disk("256k")
    with artifacts.folder(disk / "one") as partial:
        artifacts.write_rows(partial / "rows.parquet", [prompt(1)], Prompt)
    with pytest.raises(DiskError, match="the disk of .* is full"), artifacts.folder(disk / "two") as partial:
        (partial / "big").write_bytes(os.urandom(1 << 20))
    rows = [prompt(f"{i}{os.urandom(8).hex()}") for i in range(40_000)]
    with pytest.raises(DiskError):
        artifacts.write_rows(disk / "rows.parquet", rows, Prompt)
    assert not (disk / "two").exists()
    assert not (disk / "rows.parquet").exists()
    assert artifacts.read_rows(disk / "one" / "rows.parquet", Prompt) == [prompt(1)]
