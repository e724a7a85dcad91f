import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay.storage import answers, tables
from selfplay.types import Candidate


def rows(first: int, count: int) -> pa.Table:
    ids = [list(range(i, i + i % 40)) for i in range(first, first + count)]
    return pa.table(
        {
            "prompt_id": [f"p{i // 4}" for i in range(first, first + count)],
            "index": [i % 4 for i in range(first, first + count)],
            "text": ["" if i % 7 == 0 else f"ä {i} " * (i % 90) for i in range(first, first + count)],
            "token_ids": ids,
            "logp": [-0.5 * i for i in range(first, first + count)],
            "n_tokens": list(map(len, ids)),
            "finish_reason": ["stop"] * count,
            "policy": [3] * count,
            "digest": [None if i % 3 else 2**62 + i for i in range(first, first + count)],
            "thinking": [i if i % 5 == 0 else None for i in range(first, first + count)],
        },
        schema=tables.schema(Candidate),
    )


def written(path, table):
    with tables.writing(path, Candidate) as file:
        file.table(table)
    return path


@pytest.mark.parametrize(
    "sizes",
    [[1], [300, 1, 700], [40, 0, 40], [0], [20] * 40],
    ids=["one", "three", "an empty one", "only an empty one", "many"],
)
def test_a_joined_file_has_the_rows_of_all_in_their_order(tmp_path, sizes):
    starts = np.cumsum([0, *sizes])
    files = [written(tmp_path / f"{i}.parquet", rows(int(starts[i]), size)) for i, size in enumerate(sizes)]
    answers.join(files, tmp_path / "joined.parquet")
    with pq.ParquetFile(tmp_path / "joined.parquet") as file:
        assert file.read() == rows(0, sum(sizes))
        assert file.schema_arrow == tables.schema(Candidate)
        assert all(file.metadata.row_group(g).num_rows <= tables.GROUP_ROWS for g in range(file.num_row_groups))
    assert tables.count_rows(tmp_path / "joined.parquet") == sum(sizes)


def test_a_file_of_before_the_digests_is_joined_with_the_others(tmp_path):
    old = rows(0, 30).drop_columns(["digest"])
    pq.write_table(old, tmp_path / "old.parquet")
    answers.join([tmp_path / "old.parquet", written(tmp_path / "b.parquet", rows(30, 10))], tmp_path / "joined.parquet")
    both = pq.read_table(tmp_path / "joined.parquet")
    assert both.drop_columns(["digest"]) == rows(0, 40).drop_columns(["digest"])
    assert both["digest"].slice(0, 30).null_count == 30
