"""Answers that math-verify compares, in a process that is killed when it takes too long."""

import time
from pathlib import Path

import pytest

from reward.mathematics import Mathematics, gold
from reward.schema import Item


@pytest.fixture(scope="module")
def scorer():
    [found] = Mathematics(seconds=30.0).scorers()
    yield found
    found._worker.stop()


def scored(scorer, reference, response):
    messages = [{"role": "user", "content": "How many?"}]
    [score] = scorer.score([Item.model_validate({"messages": messages, "response": response, "reference": reference})])
    return score


def test_the_process_that_compares_gets_no_secret(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "hush-hush")
    [scorer] = Mathematics().scorers()
    until = time.monotonic() + 60
    while not (given := Path(f"/proc/{scorer._worker._process.pid}/environ").read_bytes()) and time.monotonic() < until:
        time.sleep(0.01)  # the kernel shows it a moment after the start
    scorer._worker.stop()
    assert b"PYTHONPATH=" in given and b"hush-hush" not in given


@pytest.mark.slow
def test_answers_are_compared_in_a_process_of_many_descriptors(many_descriptors):
    [scorer] = Mathematics(seconds=30.0).scorers()
    try:
        assert scored(scorer, "#### 18", "It is 18.").value == 1.0
    finally:
        scorer._worker.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs.\n9 * 2 = 18\n#### 18", "She makes $18.", "The answer is 9."),
        ("#### 1,000", "It is 1000.", "It is 1."),
        ("\\frac{1}{2}", "It is 0.5", "It is 2"),
        ("1/2", "\\boxed{\\frac{2}{4}}", "\\boxed{\\frac{1}{4}}"),
        ("18", "\\boxed{18}, and not 19", "\\boxed{19}, and not 18"),
        ("18", "first 17, then 18", "first 18, then 17"),
        ("$\\{1,2\\}$", "$\\{2, 1\\}$", "$\\{1, 3\\}$"),
        ("(1,2)", "\\boxed{(1, 2)}", "\\boxed{(2, 1)}"),
        ("[0,1)", "$[0, 1)$", "$[0, 1]$"),
        ("\\sqrt{8}", "$2\\sqrt{2}$", "$2\\sqrt{3}$"),
        ("x=3", "so $x = 3$", "so $x = 4$"),
        ("Hence the sum is $\\boxed{7}$.", "7", ""),
        ("50\\%", "50%", "I do not know."),
    ],
)
def test_what_is_equal_to_a_reference(scorer, reference, right, wrong):
    assert [scored(scorer, reference, response).value for response in (right, wrong)] == [1.0, 0.0]


@pytest.mark.slow
def test_an_answer_that_takes_too_long_has_no_score_and_the_next_one_has():
    """A power that no signal interrupts."""
    [scorer] = Mathematics(seconds=5.0).scorers()
    try:
        score = scored(scorer, "5", "$9^{9^{9^{9}}}$")
        assert score.value is None and "no answer within 5 s" in score.reason
        assert scored(scorer, "5", "5").value == 1.0
        assert scorer.counts["too slow to compare"] == 1
    finally:
        scorer._worker.stop()


@pytest.mark.slow
def test_a_reference_that_is_no_mathematics_gives_no_score(scorer):
    for reference, why in ((None, "no reference"), ("#### ", "no reference"), ("?!", "is no mathematics")):
        score = scored(scorer, reference, "5")
        assert score.value is None and why in score.reason


def test_the_last_mark_begins_the_reference():
    assert gold("a #### 1 #### 2 ") == "2"


def test_a_reference_that_is_missing_is_unreadable():
    assert Mathematics().unreadable(None) and not Mathematics().unreadable("2")
