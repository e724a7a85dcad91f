import dataclasses
import errno
import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from selfplay.errors import DamagedError, DiskError
from selfplay.prompts import formats, parts, pool, rows
from selfplay.storage import seals, tables
from selfplay.types import Prompt


def conversation(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def prompt(text, split="train", **fields):
    messages = conversation(text)
    return Prompt(prompt_id=formats.prompt_id(messages), messages=messages, prompt_ids=[1], split=split, **fields)


def opened(folder, prompts=None, kind="new"):
    """The pool of a folder; with prompts it is written first, as the importer writes it now, or as it did before."""
    if prompts is not None and kind == "old":
        tables.write_rows(folder / pool.OLD, prompts, Prompt)
    elif prompts is not None:
        (folder / pool.PROMPTS).mkdir(parents=True)
        rows.write(folder / pool.FACTS, parts.facts_of(prompts))
        for start in range(0, len(prompts), 700):
            table = tables.to_table(prompts[start : start + 700], Prompt)
            each = 16 if kind == "sixteen" else rows.BATCH_ROWS
            table = table if kind == "sixteen" else rows.filled(table)
            rows.write(folder / pool.PROMPTS / f"{start:09d}.arrow", table, each)
    return pool.Pool(folder)


def test_added_prompts_stay(tmp_path):
    first, second, third = (prompt(f"number {i}", joined=i or None) for i in range(3))
    assert list(opened(tmp_path, [first])) == [first]
    pool.write_added(tmp_path, [second])
    pool.write_added(tmp_path, [third])
    found = opened(tmp_path)
    assert list(found) == [first, second, third] and len(found) == 3
    assert sorted(p.name for p in (tmp_path / "added").glob("*.parquet")) == ["0001.parquet", "0002.parquet"]
    assert found.training()[1].tolist() == [0, 1, 2]


def test_a_pool_written_before_prompts_could_join_is_read(tmp_path):
    row = prompt("old", parent="root of old")
    tables.write_rows(tmp_path / "new.parquet", [row], Prompt)
    pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(["root", "joined"]), tmp_path / pool.OLD)
    assert list(pool.Pool(tmp_path)) == [row]
    assert row.ancestor == "root of old"


def test_the_numbers_of_many_names_are_those_of_each():
    named = formats.names(np.array([0, 1, 2**63 - 1, 0x0123456789ABCDEF]))
    assert formats.hashes_of(named).tolist() == [0, 1, 2**63 - 1, 0x0123456789ABCDEF]
    assert formats.hashes_of([]).tolist() == []
    for odd in ("8000000000000000", "0123456789ABCDEF", "0123", "0123456789 abcde", "ünknown 16 signs"):
        every = [*named, odd]
        assert formats.hashes_of(every).tolist() == [*map(formats.hash_of, every)] and formats.hash_of(odd) == -1


def test_columns_without_a_value_take_no_space(tmp_path):
    """Whether a file has them or not, its prompts are the same."""
    prompts = [prompt("one", root="the root of one"), prompt("two", "heldout", reference=""), prompt("three")]
    table = tables.to_table(prompts, Prompt)
    there = set(rows.filled(table).column_names)
    assert set(table.column_names) - there == {"parent", "joined"}
    rows.write(tmp_path / "whole.arrow", table)
    rows.write(tmp_path / "filled.arrow", rows.filled(table))
    for name in ("whole", "filled"):
        found = rows.take(tmp_path / f"{name}.arrow", np.array([0, 2, 2]))
        assert found.schema == tables.schema(Prompt)
        assert tables.records(found, Prompt) == [prompts[i] for i in (0, 2, 2)]
    assert rows.filled(table.slice(0, 0)).column_names == table.column_names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["old", "sixteen", "new"])
def test_a_pool_is_read_where_it_is_asked_for(tmp_path, kind):
    """Of 2,000 prompts of 500 tokens, 8 MB of ids alone, next to nothing is held."""
    splits = {3: "heldout", 5: "audit", 1999: "heldout"}
    prompts = [
        dataclasses.replace(
            prompt(f"number {i}", splits.get(i, "train")), prompt_ids=[i] * (500 - i % 3), meta={"i": i}
        )
        for i in range(2000)
    ]
    opened(tmp_path, prompts, kind)
    gc.collect()
    tracemalloc.start()
    found = pool.Pool(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 500_000
    wanted = [1999, 3, 3, 700, 699, 1400, 0]
    assert found.read([prompts[i].prompt_id for i in wanted]) == [prompts[i] for i in wanted]
    found.write([prompts[i].prompt_id for i in wanted], tmp_path / "some.parquet")
    assert tables.read_rows(tmp_path / "some.parquet", Prompt) == [prompts[i] for i in wanted]
    assert found.read([]) == []
    found.write([], tmp_path / "none.parquet")
    assert tables.read_rows(tmp_path / "none.parquet", Prompt) == []
    assert found.ids("heldout") == [prompts[i].prompt_id for i in (3, 1999)]
    assert found.ids("audit") == [prompts[5].prompt_id]
    hashes, first = found.training()
    assert formats.names(hashes) == [p.prompt_id for p in prompts if p.split == "train"] and not first.any()
    assert prompts[5].prompt_id in found and "another" not in found and prompt("another").prompt_id not in found
    for absent in ("another", prompt("another").prompt_id):
        with pytest.raises(KeyError, match=absent):
            found.read([prompts[0].prompt_id, absent])
    new = [prompt("new", joined=2), prompt("newer", joined=2)]
    assert found.join([prompts[5], new[0], new[0]]) == 1 and found.join(new) == 1
    assert found.training()[1][-2:].tolist() == [2, 2]
    assert found.read([new[1].prompt_id, prompts[9].prompt_id]) == [new[1], prompts[9]]
    assert list(found) == list(pool.Pool(tmp_path)) == [*prompts, *new]
    assert pool.page(tmp_path, 698, 4) == (prompts[698:702], 2002)
    assert pool.page(tmp_path, 1999, 9) == ([prompts[1999], *new], 2002)
    assert pool.page(tmp_path, 2002, 9) == ([], 2002)


def test_a_folder_without_a_pool_has_no_page(tmp_path):
    assert pool.page(tmp_path / "none", 0, 5) == ([], 0)


def test_many_prompts_are_written_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "CHUNK", 100)
    prompts = [prompt(f"number {i}") for i in range(1500)]
    found = opened(tmp_path, prompts)
    order = np.random.default_rng(0).permutation(1500)[:950]
    found.write([prompts[i].prompt_id for i in order], tmp_path / "some.parquet")
    assert tables.read_rows(tmp_path / "some.parquet", Prompt) == [prompts[i] for i in order]


def test_the_facts_of_an_old_pool_are_made_once(tmp_path):
    found = opened(tmp_path, [prompt("How do plants grow?"), prompt("Why?", "heldout")], "old")
    assert not (tmp_path / pool.FACTS).exists()
    known = np.array(
        [parts.facts_of([prompt(text)])["same"][0].as_py() for text in ("WHY?", "Who?", "how do plants  grow?")]
    )
    assert found.has_same(known).tolist() == [True, False, True]
    made = (tmp_path / pool.FACTS).stat().st_mtime_ns
    again = pool.Pool(tmp_path)
    assert again.has_same(known).tolist() == [True, False, True]
    assert (tmp_path / pool.FACTS).stat().st_mtime_ns == made
    assert list(again) == list(found) and again.ids("heldout") == [prompt("Why?").prompt_id]


def test_prompts_that_join_often_are_in_few_files(tmp_path, monkeypatch):
    """Of joins 1 … 10 three become a file, and three of these another. Order, places and a killed merge do not matter."""
    monkeypatch.setattr(pool.added, "FILES", 3)
    first, *later = (prompt(f"number {i}", joined=i or None) for i in range(12))
    found = opened(tmp_path, [first])
    there = tmp_path / "added"
    for one in later[:8]:
        found.join([one])
    names = ["0001-0003.parquet", "0004-0006.parquet", "0007.parquet", "0008.parquet"]
    assert sorted(p.name for p in there.iterdir()) == sorted([*names, *(f"{name}.sha256" for name in names)])
    assert all(map(seals.is_sealed, there.glob("*.parquet")))
    for name in ("0004", "0005"):  # as a kill between the merge and the deletion leaves them
        tables.write_rows(there / f"{name}.parquet", [], pool.Added)
    whole = (there / "0008.parquet").read_bytes()
    (there / "0008.parquet").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedError, match="0008.parquet"):  # damage is not hashed anew as part of a larger file
        opened(tmp_path).join([prompt("another", joined=9)])
    (there / "0008.parquet").write_bytes(whole)
    for path in (*there.glob("0009.*"),):
        path.unlink()
    found = opened(tmp_path)
    found.join([later[8]])
    assert sorted(p.name for p in there.iterdir()) == ["0001-0009.parquet", "0001-0009.parquet.sha256"]
    found.join(later[9:])
    for each in (found, opened(tmp_path)):
        assert list(each) == [first, *later]
        assert each.read([later[7].prompt_id, later[10].prompt_id]) == [later[7], later[10]]
        assert each.training()[1].tolist() == list(range(12))
    assert pool.page(tmp_path, 6, 3) == ([first, *later][6:9], 12)


def test_a_disk_that_is_full_when_the_first_prompts_join_is_told_as_one(tmp_path, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskError, match="is full"):
        pool.write_added(tmp_path, [prompt("new")])
    assert not any(tmp_path.iterdir())
