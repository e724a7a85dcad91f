"""The rubric of evaluate.gold as `selfplay check` calls it: on held-out prompts, with `meta` and without."""

import json

import pytest
from mini import TINY

from selfplay.checks.functions import rewriter, rubric
from selfplay.config import load

RUBRICS = """
import numpy

def length(messages, response, meta):
    return {"total": numpy.float32(len(response)), "words": len(messages[-1]["content"].split())}

def needs_meta(messages, response, meta):
    return {"total": float(response == meta["answer"])}

def divides(messages, response, meta):
    return {"total": 1 / len(response)}

def no_total(messages, response, meta):
    return {"score": 1.0}

def a_number(messages, response, meta):
    return 1.0

def not_finite(messages, response, meta):
    return {"total": float("nan")}

def a_word(messages, response, meta):
    return {"total": "good"}
"""


@pytest.fixture
def look(tmp_path, monkeypatch):
    """What the check says about a rubric, given the rows of the held-out file."""
    (tmp_path / "rubrics_of_a_user.py").write_text(RUBRICS)
    monkeypatch.syspath_prepend(tmp_path)
    heldout = tmp_path / "heldout.jsonl"

    def found(name, rows):
        heldout.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sets = [f"evaluate.gold=rubrics_of_a_user:{name}", f"prompts.heldout={heldout}"]
        return [(f.level, f.text.replace(str(heldout), "FILE")) for f in rubric(load(TINY, sets), tmp_path)]

    return found


BARE, WITH_META = {"prompt": "how much?"}, {"prompt": "what is it?", "meta": {"answer": "a"}}


def test_a_rubric_that_grades_every_prompt_is_fine_and_its_parts_are_named(look):
    expected = "rubrics_of_a_user:length gives total, words; it was tried on 2 of the prompts in FILE"
    assert look("length", [BARE, WITH_META]) == [("ok", expected)]


def test_prompts_of_either_kind_are_tried_wherever_they_stand_in_the_file(look):
    """Four with meta, of fifty, and the only one without, which is the last."""
    rows = [{"prompt": f"number {i}", "meta": {"answer": str(i)}} for i in range(50)]
    ((level, text),) = look("length", [*rows, BARE])
    assert level == "ok" and "tried on 5 of the prompts" in text
    assert look("needs_meta", rows)[0][0] == "ok"
    ((level, text),) = look("needs_meta", [*rows, BARE])
    assert level == "error"
    assert text.startswith(
        "rubrics_of_a_user:needs_meta fails on prompt 51 of FILE (without `meta`: the rubric is given {}) and the answer "
        "'This is an example of an answer.': KeyError: 'answer'; "
    )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("divides", "and the answer '': ZeroDivisionError: division by zero"),
        ("no_total", "ValueError: it returns no `total`, but score"),
        ("a_number", "TypeError: it returns 1.0, which is no mapping of names to numbers"),
        ("not_finite", "ValueError: its part 'total' is nan, which is not finite"),
        ("a_word", "TypeError: its part 'total' is 'good', which is no number"),
    ],
)
def test_what_would_end_a_round_is_an_error_that_says_what_is_wrong(look, name, why):
    ((level, text),) = look(name, [WITH_META])
    assert level == "error" and why in text and "(with the `meta` of its row)" in text


def test_rows_that_the_import_sets_aside_are_not_tried(look):
    assert look("length", [{"nothing": 1}]) == []  # the look at the prompts says that there is none
    ((level, text),) = look("length", [{"nothing": 1}, BARE])
    assert level == "ok" and "tried on 1 of the prompts" in text


def test_held_out_prompts_of_the_hub_are_not_loaded_for_it(tmp_path):
    sets = ["prompts.heldout=org/heldout", "evaluate.gold=selfplay.worlds.tiny:grade"]
    ((level, text),) = [(f.level, f.text) for f in rubric(load(TINY, sets), tmp_path)]
    assert level == "ok" and "it was not tried" in text


def test_a_rewriter_of_the_users_own_has_to_be_there(tmp_path):
    assert list(rewriter(load(TINY), tmp_path)) == []
    (found,) = rewriter(load(TINY, ["evolve.rewriter=json:dumps"]), tmp_path)
    assert (found.level, found.text) == ("ok", "json:dumps can be imported")
