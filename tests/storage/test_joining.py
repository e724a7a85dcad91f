import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay.storage import joining, tables
from selfplay.types import Candidate, Prompt


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
def test_a_joined_file_is_what_arrow_would_have_written(tmp_path, sizes):
    starts = np.cumsum([0, *sizes])
    files = [written(tmp_path / f"{i}.parquet", rows(int(starts[i]), size)) for i, size in enumerate(sizes)]
    joining.join(files, tmp_path / "joined.parquet")
    with pq.ParquetFile(tmp_path / "joined.parquet", page_checksum_verification=True) as file:
        assert file.read() == rows(0, sum(sizes))
        assert file.schema_arrow == tables.schema(Candidate)
        sources = [pq.read_metadata(source) for source in files]
        groups = [source.row_group(g) for source in sources for g in range(source.num_row_groups)]
        assert [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)] == [g.num_rows for g in groups]
        for number, group in enumerate(groups):  # one row group alone, by its place in the file
            start = sum(g.num_rows for g in groups[:number])
            assert file.read_row_group(number) == rows(start, group.num_rows)
    assert tables.count_rows(tmp_path / "joined.parquet") == sum(sizes)


def test_page_indexes_are_left_out_since_they_hold_offsets_themselves(tmp_path):
    for name in "ab":
        pq.write_table(
            rows(0, 500), tmp_path / name, write_page_index=True, write_page_checksum=True, row_group_size=90
        )
    assert pq.read_metadata(tmp_path / "a").row_group(5).column(3).has_offset_index
    joining.join([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    with pq.ParquetFile(tmp_path / "joined", page_checksum_verification=True) as file:
        assert file.read() == pa.concat_tables([rows(0, 500)] * 2)
        assert not file.metadata.row_group(11).column(3).has_offset_index
    assert pq.read_table(tmp_path / "joined", filters=[("logp", "<", -249.0)]).num_rows == 2


def test_a_joined_file_can_be_joined(tmp_path):
    files = [written(tmp_path / f"{i}.parquet", rows(10 * i, 10)) for i in range(3)]
    joining.join(files[:2], tmp_path / "two.parquet")
    joining.join([tmp_path / "two.parquet", files[2]], tmp_path / "three.parquet")
    assert pq.read_table(tmp_path / "three.parquet") == rows(0, 30)


def test_footers_are_encoded_as_they_were(tmp_path):
    """Byte for byte, for files with all the types that records have: Arrow's own encoder wrote them."""
    tables.write_rows(
        tmp_path / "prompts.parquet", [Prompt(prompt_id="p", messages=[], prompt_ids=[], split="train")], Prompt
    )
    for path in (written(tmp_path / "a.parquet", rows(0, 600)), tmp_path / "prompts.parquet"):
        footer, start = joining.read_footer(path)
        assert joining.encode(footer) == path.read_bytes()[start:-8]


def test_numbers_of_all_sizes_and_long_lists():
    numbers = [0, -1, 1, 63, -64, 64, 300, -(2**63), 2**63 - 1]
    value = {
        1: (6, 5),
        20: (9, (6, numbers)),
        21: (1, None),
        22: (9, (8, [b"x" * 200] * 20)),
        500: (12, {3: (7, b"12345678")}),
    }
    assert joining.decode(joining.encode(value)) == value


def test_other_columns_are_not_joined(tmp_path):
    one = written(tmp_path / "one.parquet", rows(0, 5))
    pq.write_table(rows(5, 5).drop_columns(["digest"]), tmp_path / "two.parquet")
    with pytest.raises(joining.OtherLayout):
        joining.join([one, tmp_path / "two.parquet"], tmp_path / "joined.parquet")
    assert not (tmp_path / "joined.parquet").exists()
