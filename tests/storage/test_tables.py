import dataclasses
import errno
import math
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from selfplay import seeds
from selfplay.errors import CheckpointError, DiskError
from selfplay.storage import folders, hashes, tables
from selfplay.types import Prompt, Scored


def prompt(i):
    return Prompt(
        prompt_id=f"p{i}",
        messages=[{"role": "user", "content": "héllo"}],
        prompt_ids=[1, 2],
        split="train",
        meta={"a": [i]},
    )


def other(i):
    return dataclasses.replace(prompt(i), split="audit")


def scored(reward):
    return Scored(
        prompt_id="p", index=0, text="x", token_ids=[], logp=-1.5, n_tokens=0, finish_reason="stop", policy=3,
        reward=reward, reward_parts={"total": 0.5},
    )  # fmt: skip


def test_rows_come_back_as_they_went(tmp_path):
    for rows, kind in (([prompt(1), prompt(2)], Prompt), ([scored(0.1), scored(None)], Scored), ([], Scored)):
        tables.write_rows(tmp_path / "rows.parquet", rows, kind)
        assert tables.read_rows(tmp_path / "rows.parquet", kind) == rows


def test_equal_rows_are_equal_bytes(tmp_path):
    for name in ("a", "b"):
        tables.write_rows(tmp_path / name, [prompt(i) for i in range(50)], Prompt)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "stage"
    with pytest.raises(RuntimeError), folders.folder(target) as partial:
        (partial / "half").write_text("half")
        raise RuntimeError
    assert not target.exists()
    with folders.folder(target) as partial:
        assert list(partial.iterdir()) == []  # what the failed one left is gone
        (partial / "all").write_text("all")
    assert [p.name for p in target.iterdir()] == ["all"]


def test_every_new_name_of_a_folder_is_synced(tmp_path, monkeypatch):
    synced, sync = [], folders.sync
    monkeypatch.setattr(folders, "sync", lambda path: (synced.append(path), sync(path)))
    target = tmp_path / "rounds" / "0001" / "stage"
    with folders.folder(target) as partial:
        assert synced == [target.parent, tmp_path / "rounds", tmp_path]
        (partial / "file").write_text("x")
    assert synced[3:] == [partial / "file", partial, target.parent]
    synced.clear()
    folders.make(target)
    assert synced == []


def test_a_file_that_changed_or_is_gone_is_noticed(tmp_path):
    (tmp_path / "a").write_text("one")
    files = hashes.hash_files(tmp_path)
    hashes.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "a").write_text("two")
    with pytest.raises(CheckpointError, match="is not what its manifest says"):
        hashes.verify_files(tmp_path, files, CheckpointError)
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        hashes.verify_files(tmp_path, files, CheckpointError)


@pytest.mark.parametrize("count", [1, tables.GROUP_ROWS, 2 * tables.GROUP_ROWS + 5])
def test_one_row_and_the_rows_with_a_value(tmp_path, count):
    path, rows = tmp_path / "rows.parquet", [(other if i else prompt)(f"{i % 300}") for i in range(count)]
    tables.write_rows(path, rows, Prompt)
    for index in {0, count // 2, count - 1}:
        assert tables.read_row(path, Prompt, index) == rows[index]
    for index in (-1, count):
        with pytest.raises(IndexError, match=f"has {count} rows"):
            tables.read_row(path, Prompt, index)
    assert tables.count_rows(path) == count
    for start, many in ((0, 3), (count // 2, tables.GROUP_ROWS + 9), (count - 1, 5), (count, 5), (0, 0)):
        assert tables.read_slice(path, Prompt, start, many) == rows[start : start + many]
    wanted = {rows[0].prompt_id, rows[-1].prompt_id, "no such"}
    assert list(tables.rows_with(path, Prompt, "prompt_id", wanted)) == [r for r in rows if r.prompt_id in wanted]
    assert list(tables.rows_with(path, Prompt, "prompt_id", [])) == []


def test_no_more_than_a_row_group_is_decoded_for_one_row(tmp_path):
    path = tmp_path / "rows.parquet"
    tables.write_rows(path, [prompt(f"{i}") for i in range(1000)], Prompt)
    file = pq.ParquetFile(path)
    assert file.num_row_groups == math.ceil(1000 / tables.GROUP_ROWS)


def test_pandas_is_not_imported_where_it_was_left_out():
    code = (
        "import sys, tempfile, pathlib; from selfplay.storage import tables; from selfplay.types import ReferenceLogp as R\n"
        "tables.leave_pandas_out(); path = pathlib.Path(tempfile.mkdtemp()) / 'x'; rows = [R(prompt_id='a', index=1, logp=-1.5)]\n"
        "tables.write_rows(path, rows, R); assert tables.read_rows(path, R) == rows; print('pandas' in sys.modules)\n"
        "import pandas, pyarrow; print(pyarrow.Table.from_pandas(pandas.DataFrame({'a': [1]})).to_pandas()['a'].tolist())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["False", "[1]"]


def test_seeds_depend_on_every_part_and_fit_63_bits():
    found = {seeds.derive(*parts) for parts in [(0, 1, "a"), (0, 1, "b"), (0, 11, "a"), (1, 1, "a"), ("0\x001", "a")]}
    assert len(found) >= 4
    assert all(0 <= s < 2**63 for s in found)
    assert seeds.derive(0, 1, "a") == seeds.derive(0, 1, "a")


def test_too_little_space_is_told_before_a_stage(tmp_path):
    folders.require_free(tmp_path, 1)
    with pytest.raises(DiskError, match="free, the next stage needs about"):
        folders.require_free(tmp_path, 1 << 60)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), folders.disk_errors(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_a_full_disk_is_a_clear_error_and_what_was_finished_is_kept(small_disk):
    disk = small_disk("256k")
    with folders.folder(disk / "one") as partial:
        tables.write_rows(partial / "rows.parquet", [prompt(1)], Prompt)
    with pytest.raises(DiskError, match="the disk of .* is full"), folders.folder(disk / "two") as partial:
        (partial / "big").write_bytes(os.urandom(1 << 20))
    rows = [prompt(f"{i}{os.urandom(8).hex()}") for i in range(40_000)]
    with pytest.raises(DiskError):
        tables.write_rows(disk / "rows.parquet", rows, Prompt)
    assert not (disk / "two").exists()
    assert not (disk / "rows.parquet").exists()
    assert tables.read_rows(disk / "one" / "rows.parquet", Prompt) == [prompt(1)]
