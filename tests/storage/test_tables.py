import dataclasses
import errno
import math
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay import seeds
from selfplay.errors import CheckpointError, DiskError
from selfplay.storage import folders, hashes, tables
from selfplay.types import Candidate, Prompt, Scored


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


def test_every_new_name_that_is_to_stay_is_synced(tmp_path, monkeypatch):
    synced, sync = [], folders.sync
    monkeypatch.setattr(folders, "sync", lambda path: (synced.append(path), sync(path)))
    target = tmp_path / "rounds" / "0001" / "stage"
    with folders.folder(target) as partial:
        assert synced == [tmp_path, tmp_path / "rounds"]
        (partial / "file").write_text("x")
    assert synced[2:] == [partial / "file", partial, target.parent]
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """Ten candidates as versions before the column `digest` wrote them: ids of 64 bits, row groups of four."""
    rows = [
        Candidate(
            prompt_id=f"p{i // 2}", index=i % 2, text=f"text {i}", token_ids=[i] * (i % 3), logp=-float(i), n_tokens=i % 3,
            finish_reason="stop", policy=1,
        )
        for i in range(10)
    ]  # fmt: skip
    table = tables.to_table(rows, Candidate).drop_columns(["digest"])
    place = table.column_names.index("token_ids")
    wide = table.schema.set(place, pa.field("token_ids", pa.list_(pa.int64())))
    pq.write_table(table.cast(wide), tmp_path / "old.parquet", row_group_size=4)
    return tmp_path / "old.parquet", rows


def test_an_older_file_is_read_as_if_it_were_written_today(old):
    path, rows = old
    assert tables.read_rows(path, Candidate) == rows
    assert tables.read_row(path, Candidate, 5) == rows[5]
    assert list(tables.rows_with(path, Candidate, "prompt_id", {"p1"})) == rows[2:4]
    for table in tables.each_group(path, row_type=Candidate):
        assert table.schema == tables.schema(Candidate)
        assert table["digest"].null_count == table.num_rows
    whole = tables.read_table(path, ("digest", "token_ids", "index"), Candidate)
    assert whole.schema.types == [pa.int64(), pa.list_(pa.int32()), pa.int64()]
    assert whole["token_ids"].to_pylist() == [row.token_ids for row in rows]


def test_without_a_record_type_the_columns_are_as_they_were_written(old):
    path, rows = old
    (first, *_) = tables.each_group(path, ["token_ids", "digest"])
    assert first.schema.names == ["token_ids"] and first.schema.types == [pa.list_(pa.int64())]
    assert list(tables.read_columns(path, ("index", "digest"))) == [(row.index, None) for row in rows]
    assert tables.read_array(path, "logp").tolist() == [row.logp for row in rows]


@pytest.mark.parametrize(("start", "count"), [(0, None), (3, 2), (4, 4), (9, 5), (10, 1), (0, 0), (2, 7)])
def test_groups_of_some_rows_have_just_these(old, start, count):
    path, rows = old
    found = list(tables.each_group(path, ["index", "text"], row_type=Candidate, start=start, count=count))
    end = None if count is None else start + count
    assert [text for table in found for text in table["text"].to_pylist()] == [r.text for r in rows[start:end]]
    assert all(0 < table.num_rows <= 4 for table in found)


def test_rows_are_taken_by_their_numbers_in_any_order(old):
    path, rows = old
    with tables.RowReader(path, ("text", "token_ids"), Candidate) as reader:
        for numbers in ([0], [9, 0, 5, 5, 4], list(range(10)), list(range(9, -1, -1)), []):
            found = reader.take(numbers)
            assert found.schema.names == ["text", "token_ids"]
            assert found.schema.types == [pa.string(), pa.list_(pa.int32())]
            assert found["text"].to_pylist() == [rows[i].text for i in numbers]
            assert found["token_ids"].to_pylist() == [rows[i].token_ids for i in numbers]
        for numbers in ([10], [-1], [0, 99]):
            with pytest.raises(AssertionError, match="rows that are not there"):
                reader.take(numbers)


def test_rows_that_are_asked_for_in_ascending_order_decode_every_group_once(old, monkeypatch):
    path, rows = old
    decoded = []
    read = tables._Groups.read
    monkeypatch.setattr(tables._Groups, "read", lambda self, group: decoded.append(group) or read(self, group))
    with tables.RowReader(path, ("text",), Candidate) as reader:
        texts = [reader.take(part)["text"].to_pylist() for part in ([0, 1], [2, 5], [6], [7, 8, 9])]
    assert [text for part in texts for text in part] == [rows[i].text for i in (0, 1, 2, 5, 6, 7, 8, 9)]
    assert decoded == [0, 1, 2]


def test_rows_of_an_empty_file_are_none(tmp_path):
    tables.write_rows(tmp_path / "none.parquet", [], Candidate)
    with tables.RowReader(tmp_path / "none.parquet", ("text",), Candidate) as reader:
        assert reader.take([]).num_rows == 0 and reader.take([]).schema.names == ["text"]
    assert list(tables.each_group(tmp_path / "none.parquet", row_type=Candidate)) == []
    assert tables.read_table(tmp_path / "none.parquet", ("index", "digest"), Candidate).num_rows == 0


def test_tables_and_records_go_into_one_file_in_the_order_they_came(tmp_path):
    """A table may have its columns in another order, and integers of another width; each call ends a row group."""
    path = tmp_path / "rows.parquet"
    rows = [prompt(i) for i in range(3)]
    table = tables.to_table(rows, Prompt)
    ids = table.schema.get_field_index("prompt_ids")
    narrow = table.schema.set(ids, pa.field("prompt_ids", pa.list_(pa.int16())))
    with tables.writing(path, Prompt) as file:
        file.records(rows[:1])
        file.table(table.cast(narrow).select(table.column_names[::-1]).slice(1))
        file.records([])
        assert file.rows == 3
    assert tables.read_rows(path, Prompt) == rows
    written = pq.ParquetFile(path)
    assert written.schema_arrow.equals(tables.schema(Prompt))
    assert [written.metadata.row_group(i).num_rows for i in range(written.num_row_groups)] == [1, 2]


def test_a_file_whose_writer_failed_is_not_there(tmp_path):
    path = tmp_path / "rows.parquet"
    with pytest.raises(RuntimeError), tables.writing(path, Prompt) as file:
        file.records([prompt(1)])
        raise RuntimeError
    assert not path.exists()
    with pytest.raises(KeyError), tables.writing(path, Prompt) as file:
        file.table(pa.table({"prompt_id": ["p"]}))
    assert not path.exists()
