"""What the reference of a row is, and that it stays with its prompt."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_importer import built, jsonl, settings
from test_pool import opened, prompt

from selfplay.prompts import pool, rows
from selfplay.prompts.references import reference_of
from selfplay.storage import tables
from selfplay.types import Prompt

COMMA = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x"}, None),
        ({"reference": "a", "answer": "b"}, "a"),
        ({"reference": None, "answer": "", "solution": "c", "ground_truth": "d"}, "c"),
        ({"answer": 18}, "18"),
        ({"reward_model": {"style": "rule", "ground_truth": "18"}}, "18"),
        ({"ground_truth": [1, "é"]}, '[1, "é"]'),
        (
            {"instruction_id_list": ["a:b"], "kwargs": [{"n": 3, "word": None}], "answer": "b", "key": 1},
            '{"instruction_id_list": ["a:b"], "kwargs": [{"n": 3}]}',
        ),
        ({"test_list": ["assert f(1)"], "test_setup_code": "", "code": "…"}, '{"test_list": ["assert f(1)"]}'),
        ({"test": "def check(f): …", "entry_point": "f"}, '{"entry_point": "f", "test": "def check(f): …"}'),
        ({"test": "no function is named"}, None),
    ],
)
def test_the_reference_of_a_row(row, expected):
    assert reference_of(row) == expected


def test_a_reference_is_the_same_from_every_kind_of_file_and_on_both_sides_of_the_split(tmp_path):
    """Parquet has all keys of all kwargs in each row, null where a row has none; JSONL as published has few of them."""
    frequency = {"instruction_id_list": ["keywords:frequency"], "kwargs": [{"keyword": "sea", "frequency": 2}]}
    given = [{"prompt": f"question {i}", **(frequency if i % 2 else COMMA)} for i in range(40)]
    jsonl(tmp_path / "a.jsonl", given)
    pq.write_table(pa.Table.from_pylist(given), tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.parquet"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        prompts, set_aside = built(settings(tmp_path / name), folder)
        assert len(prompts) == 40 and not set_aside and len({p.split for p in prompts}) > 1
        found.append({p.messages[0]["content"]: json.loads(p.reference) for p in prompts})
    assert found[0] == found[1] == {row["prompt"]: {k: row[k] for k in COMMA} for row in given}


def test_a_reference_that_cannot_be_stored_sets_its_row_aside(tmp_path):
    given = [{"prompt": f"question {i}"} for i in range(40)]
    deep = b'{"prompt": "deep", "answer": ' + b"[" * 900 + b"]" * 900 + b"}"
    half = {"prompt": "half", "answer": "\ud800"}
    prompts, set_aside = built(settings(jsonl(tmp_path / "a.jsonl", [*given, half, deep])), tmp_path)
    assert len(prompts) == 40
    reasons = {"cannot be rendered (UnicodeEncodeError)": 1, "its reference is no JSON (RecursionError)": 1}
    assert dict(set_aside) == reasons


def test_a_pool_that_was_written_before_there_were_references_is_read(tmp_path):
    before, after = prompt("before"), prompt("after", reference="42", joined=1)
    opened(tmp_path, [before])
    file = tmp_path / pool.PROMPTS / "000000000.arrow"
    rows.write(file, tables.to_table([before], Prompt).drop_columns(["reference"]))
    found = pool.Pool(tmp_path)
    assert found.join([after]) == 1
    assert list(pool.Pool(tmp_path)) == [before, after]
    found.write([after.prompt_id, before.prompt_id], tmp_path / "drawn.parquet")
    assert [p.reference for p in tables.read_rows(tmp_path / "drawn.parquet", Prompt)] == ["42", None]
