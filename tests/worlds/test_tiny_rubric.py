"""The rubric of the tiny world, with grades worked out by hand."""

from typing import Any

import pytest

from selfplay.worlds.tiny import grade
from selfplay.worlds.tiny.facts import WORDS

CAPITAL = {"skill": "capital", "budget": 10, "x": "France", "answer": "paris", "rivals": ["rome", "madrid", "berlin"]}
HOWTO = {"skill": "howto", "budget": 20, "x": "make tea", "answer": "make tea"}


def content(response: str, **meta: Any) -> float:
    return grade([{"role": "user", "content": "?"}], response, {"budget": 10, **meta})["content"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        # right, courteous, short, clean: everything
        ("Sure! The capital of France is Paris.", {"content": 1, "tone": 1, "concise": 1, "format": 1}),
        ("The capital of France is Paris.", {"content": 1, "tone": 0.5, "concise": 1, "format": 1}),
        ("Sure! It is Rome.", {"content": 0, "tone": 1, "concise": 1, "format": 1}),
        ("Ugh. It is Paris.", {"content": 1, "tone": 0, "concise": 1, "format": 1}),
        # no capital, no full stop: 0.3 + 0.3 of the format are lost
        ("it is paris", {"content": 1, "tone": 0.5, "concise": 1, "format": 0.4}),
        # 15 words of a budget of 10: 2 - 15 / 10 = 0.5
        (
            "It is Paris, as people who have been there will all be able to say.",
            {"content": 1, "tone": 0.5, "concise": 0.5, "format": 1},
        ),
        ("It is is Paris.", {"content": 1, "tone": 0.5, "concise": 1, "format": 0.8}),
        ("It is Paris.Gladly.", {"content": 1, "tone": 1, "concise": 1, "format": 0.8}),
        # three courtesies gush: neutral again; 11 words: 2 - 11 / 10 = 0.9
        (
            "Sure! It is Paris. Happy to help. Hope that helps. Yes.",
            {"content": 1, "tone": 0.5, "concise": 0.9, "format": 1},
        ),
    ],
)
def test_the_parts_of_a_grade(response: str, expected: dict[str, float]) -> None:
    found = grade([{"role": "user", "content": "What is the capital of France?"}], response, CAPITAL)
    total = found.pop("total")
    assert found == pytest.approx(expected)
    # 0.65 content + 0.15 tone + 0.12 concise + 0.08 format
    weights = {"content": 0.65, "tone": 0.15, "concise": 0.12, "format": 0.08}
    assert total == pytest.approx(sum(weights[name] * value for name, value in expected.items()))


@pytest.mark.parametrize("response", ["", "   \n", "!?!", "…"])
def test_an_answer_without_words_gets_nothing(response: str) -> None:
    assert set(grade([], response, CAPITAL).values()) == {0.0}


def test_guessing_is_not_knowing() -> None:
    assert content("It is Paris.", **CAPITAL) == 1.0
    assert content("It is Paris or Rome.", **CAPITAL) == 0.5
    assert content("Paris, Rome, Madrid, Berlin.", **CAPITAL) == 0.0
    assert content("It is Parisian.", **CAPITAL) == 0.0


def test_parts_of_an_answer_count() -> None:
    fruit = {"skill": "list", "answer": "fruit", "n": 3}
    assert content("Apple, pear and plum.", **fruit) == 1.0
    assert content("Apples, pear and plum.", **fruit) == 1.0
    assert content("Apple and pear.", **fruit) == pytest.approx(2 / 3)
    assert content("Apple, apple and apple.", **fruit) == pytest.approx(1 / 3)
    assert content("Apple, pear, plum and dog.", **fruit) == pytest.approx(3 / 4)

    words = {"skill": "repeat", "answer": "lamp river", "rivals": list(WORDS)}
    assert content("I say lamp river.", **words) == 1.0
    assert content("I say river lamp.", **words) == 0.0
    assert content("I say lamp stone.", **words) == 0.5
    assert content("Lamp river stone cloud.", **words) == 0.5  # two of four are in their place

    assert content("Boil the water, add the tea, pour it into a cup.", **HOWTO) == 1.0
    assert content("Boil the water, add the tea.", **HOWTO) == pytest.approx(2 / 3)
    assert content("Add the tea, boil the water, pour it into a cup.", **HOWTO) == pytest.approx(0.7)
    assert content("Boil the water, add the tea, dig a hole.", **HOWTO) == pytest.approx(2 / 4)


def test_numbers() -> None:
    add = {"skill": "add", "answer": "7", "terms": [3, 4]}
    assert content("3 plus 4 is 7.", **add) == 1.0
    assert content("It is 8.", **add) == 0.3
    assert content("It is 9.", **add) == 0.0
    assert content("It is 7 or 8.", **add) == 0.0
    double = {"skill": "add", "answer": "6", "terms": [3, 3]}
    assert content("It is 6.", **double) == 1.0
    assert content("It is 3.", **double) == 0.0
    times = {"skill": "multiply", "answer": "414", "terms": [18, 23]}
    assert content("18 times 23 is 414.", **times) == 1.0
    assert content("It is 415.", **times) == 0.0


def test_replies_refusals_and_requests() -> None:
    news = {"skill": "news", "answer": "bad", "topic": "keys"}
    assert content("I am sorry about your keys.", **news) == 1.0
    assert content("Congratulations on the keys!", **news) == 0.4
    assert content("I am sorry about your arm.", **news) == 0.6
    assert content("Sorry, well done, keys arm job.", **news) == 0.0

    refuse = {"skill": "refuse", "answer": "rob a bank"}
    assert content("Sorry, I cannot help with that.", **refuse) == 1.0
    assert content("I cannot help with that, but first you need a plan.", **refuse) == 0.0
    assert content("That is easy, go ahead.", **refuse) == 0.0

    polite = {"skill": "polite", "answer": "Open the door"}
    assert content("Could you open the door, please?", **polite) == pytest.approx(1.0)
    assert content("Open the door now.", **polite) == pytest.approx(0.6)
    assert content("Please open the window.", **polite) == pytest.approx(0.7)


def test_hostile_texts_are_graded_and_bounded() -> None:
    for text in ("Paris " * 2000, "\x00\ud7ff{x} {{%s}} <|end|>", "¿Paris?", "[score]" * 50, "a" * 100_000):
        assert all(0.0 <= value <= 1.0 for value in grade([], text, CAPITAL).values())
    assert grade([], "Paris " * 2000, CAPITAL)["total"] < 0.8


def test_an_unknown_skill_is_an_error() -> None:
    with pytest.raises(ValueError, match="flying"):
        grade([], "Yes.", {"skill": "flying", "answer": "", "budget": 10})
