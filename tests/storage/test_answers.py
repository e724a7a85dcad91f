import hashlib

import numpy as np
import pyarrow as pa
import pytest

from selfplay.errors import InputError
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Prompt

IDS = [np.array(ids, np.int32) for ids in ([5, 2], [], [149_999, 7, 2], [5, 2])]


def written(path, ids=IDS, per_prompt=2):
    rows = answers.table(
        prompt_ids=[f"p{i}" for i in range(len(ids) // per_prompt)], per_prompt=per_prompt, texts=["a"] * len(ids),
        token_ids=ids, logps=[-0.5] * len(ids), finish_reasons=["stop"] * len(ids), policy=4,
    )  # fmt: skip
    with tables.writing(path, Candidate) as file:
        file.table(rows)
    return path


def test_a_table_of_answers_is_made_of_columns(tmp_path):
    rows = tables.read_rows(written(tmp_path / "a.parquet"), Candidate)
    assert [(r.prompt_id, r.index) for r in rows] == [("p0", 0), ("p0", 1), ("p1", 0), ("p1", 1)]
    assert [r.token_ids for r in rows] == [[5, 2], [], [149_999, 7, 2], [5, 2]]
    assert [r.n_tokens for r in rows] == [2, 0, 3, 2] and {r.policy for r in rows} == {4}


def test_ids_of_all_rows_lie_one_after_the_other_also_those_of_a_part(tmp_path):
    column = tables.read_table(written(tmp_path / "a.parquet"), ["token_ids"])["token_ids"]
    for part, ids, starts in (
        (column, [5, 2, 149_999, 7, 2, 5, 2], [0, 2, 2, 5, 7]),
        (column.slice(2), [149_999, 7, 2, 5, 2], [0, 3, 5]),
        (column.slice(4), [], [0]),
    ):
        found = answers.flat_ids(part)
        assert found[0].dtype == np.int32 and [each.tolist() for each in found] == [ids, starts]


def test_a_digest_is_63_bits_of_the_ids_as_int32(tmp_path):
    expected = int.from_bytes(hashlib.blake2b(bytes([5, 0, 0, 0, 2, 0, 0, 0]), digest_size=8).digest(), "big") >> 1
    found = answers.digests(written(tmp_path / "a.parquet"))
    assert found.dtype == np.int64 and found[0] == found[3] == expected == answers.digest(np.array([5, 2], np.int64))
    assert len(set(found.tolist())) == 3 and (found >= 0).all()


@pytest.mark.parametrize("ids", [IDS, []], ids=["some", "none"])
def test_digests_of_an_older_file_come_from_its_ids(tmp_path, ids):
    new = written(tmp_path / "new.parquet", ids)
    table = tables.pq.read_table(new).drop_columns(["digest"])
    wide = table.schema.field("token_ids").with_type(pa.list_(pa.int64()))
    table = table.cast(table.schema.set(table.column_names.index("token_ids"), wide))
    tables.pq.write_table(table, tmp_path / "old.parquet")
    assert answers.digests(tmp_path / "old.parquet").tolist() == answers.digests(new).tolist()


def test_answers_come_behind_their_prompts(tmp_path):
    prompts = tmp_path / "prompts.parquet"
    rows = [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=[1, i], split="train") for i in range(2)]
    tables.write_rows(prompts, rows, Prompt)
    file = written(tmp_path / "a.parquet")

    def joined(**fields):
        groups = answers.with_prompts(prompts, file, **{"start": 0, "count": 4, "per_prompt": 2, **fields})
        return [(ids.tolist(), begin) for group in groups for ids, begin in group]

    assert joined() == [([1, 0, 5, 2], 2), ([1, 0], 2), ([1, 1, 149_999, 7, 2], 2), ([1, 1, 5, 2], 2)]
    assert joined(start=1, count=2) == joined()[1:3]
    with pytest.raises(InputError, match="row 1 of .* is no answer to prompt 1"):
        joined(per_prompt=1)
    with pytest.raises(InputError, match="ends at row 4; 5 were asked for"):
        joined(count=5)
