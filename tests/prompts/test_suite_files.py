"""Files of benchmarks, as they are published."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay.errors import InputError
from selfplay.prompts.suites import read


@pytest.fixture
def rows(tmp_path):
    def write(*rows):
        path = tmp_path / "suite.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read(path)

    return write


def test_public_formats_are_read_as_they_are(rows, tmp_path):
    (ifeval,) = rows({"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}], "key": 3})
    assert json.loads(ifeval.reference) == {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (gsm,) = rows({"question": "How many?", "answer": "He has 600 and 700.\n#### 1,300"})
    assert (gsm.messages, gsm.reference) == ([{"role": "user", "content": "How many?"}], "1300")
    twice = rows({"prompt": "Say it."}, {"prompt": "Say it."})
    assert len({prompt.prompt_id for prompt in twice}) == 2 and twice[0].reference is None
    table = pa.table({"query": ["Which?"], "choices": [["a", "b"]], "gold": [1], "more": ["x"]})
    pq.write_table(table, tmp_path / "suite.parquet")
    (choice,) = read(tmp_path / "suite.parquet")
    assert choice.meta == {"choices": ["a", "b"], "gold": 1} and choice.messages[0]["content"] == "Which?"


@pytest.mark.parametrize(
    "right", [{"answer": 2}, {"gold": "2"}, {"answer": "C"}, {"answer": "(c)"}, {"answerKey": "C."}]
)
def test_the_right_choice_is_a_number_or_a_letter(rows, right):
    (found,) = rows({"question": "Which?", "choices": ["x", "y", "z"], **right})
    assert found.meta["gold"] == 2


def test_labels_of_its_own_say_which_choice_is_right(rows):
    (found,) = rows({"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"})
    assert found.meta == {"choices": ["x", "y"], "gold": 1}


GOOD = {"question": "Which?", "choices": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "has no rows"),
        ([{"choices": ["x", "y"], "answer": 0}], "row 1: no column that is known to hold prompts"),
        ([GOOD, {**GOOD, "choices": ["x"]}], "row 2: `choices` is no list of two or more texts"),
        ([{**GOOD, "answer": "C"}], "row 1: the right choice is 'C', which is neither"),
        ([{**GOOD, "answer": -1}], "the right choice is -1"),
        ([{**GOOD, "answer": None}], "none of gold, answer, answerKey says which choice is right"),
        ([GOOD, {"prompt": "Say it."}], "some rows only have `choices`"),
    ],
)
def test_what_is_no_benchmark_is_named(rows, given, said):
    with pytest.raises(InputError, match=said):
        rows(*given)
