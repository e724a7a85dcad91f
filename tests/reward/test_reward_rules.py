import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reward_world import serving_rules

from reward import kinds
from reward.client import RewardClient
from reward.schema import Item
from reward.scorer import ModelRefused, Score, Scorer


def item(response: str, reference: str | None = None, question: str = "How many?") -> Item:
    messages = [{"role": "user", "content": question}]
    return Item.model_validate({"messages": messages, "response": response, "reference": reference})


def made(rules: str) -> Scorer:
    """The scorer of rules that are written as JSON, or in a file."""
    (scorer,) = kinds.load("rules", rules).scorers()
    return scorer


def value(response: str, reference: str | None = None, **rule: Any) -> float | None:
    (score,) = made(json.dumps([rule])).score([item(response, reference)])
    return score.value


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (20, 1.0), (30, 0.5), (40, 0.0), (50, 0.0)]
)
def test_length_is_full_within_its_limits_and_falls_evenly_outside(words: int, expected: float) -> None:
    assert value("a " * words, rule="length", min=10, max=20) == pytest.approx(expected)
    assert value("a" * words, rule="length", min=10, max=20, unit="characters") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>1 + 1</think>\n<answer>2</answer>\n", 1.0),
        ("<think>a\nb</think><answer></answer>", 1.0),
        ("<answer>2</answer><think>1</think>", 0.0),
        ("<think>1</think><answer>2</answer> more", 0.0),
        ("<think>1</think><think>1</think><answer>2</answer>", 0.0),
        ("<think>1<think></think><answer>2</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_wants_each_tag_once_and_nothing_else(response: str, expected: float) -> None:
    assert value(response, rule="format", tags=["think", "answer"]) == expected


def test_regex() -> None:
    assert value("It is Paris.", rule="regex", pattern=r"\bParis\b") == 1.0
    assert value("It is Paris.", rule="regex", pattern=r"\bParis\b", absent=True) == 0.0
    assert value("It is Paris.", rule="regex", pattern=r"as an AI", absent=True, weight=-2) == -2.0


@pytest.mark.slow
def test_a_pattern_that_takes_for_ever_sets_its_item_aside() -> None:
    rules = made('[{"rule": "regex", "pattern": "^(a|aa|a?b?)+$"}]')
    slow, good = rules.score([item("a" * 5000 + "!"), item("aa")])
    assert good == Score(value=1.0)
    assert slow == Score(reason="the rule regex: its pattern took more than 1 s")


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("The answer is 42.", "42", 1.0),
        ("First 42, then 1,234.50", "1234.5", 1.0),
        (r"So 7, hence \boxed{3/4} and not 9", "0.75", 1.0),
        ("-3", "3", 0.0),
        ("no number", "3", 0.0),
        ("9" * 100_000, "9", 0.0),
        ("1/0", "1", 0.0),
        ("1000000.5", "1000000", 1.0),
    ],
)
def test_numeric(response: str, reference: str, expected: float) -> None:
    assert value(response, reference, rule="numeric") == expected


def test_exact_and_where_references_come_from(tmp_path: Path) -> None:
    assert value(" Paris \n", "Paris", rule="exact") == 1.0
    assert value("paris", "Paris", rule="exact") == 0.0
    assert value("paris", "Paris", rule="exact", ignore_case=True) == 1.0
    assert value("I think. Answer: Paris.", "Paris", rule="exact", pattern=r"Answer: (\w+)") == 1.0
    assert value("I think.", "Paris", rule="exact", pattern=r"Answer: (\w+)") == 0.0
    known = tmp_path / "known.jsonl"
    known.write_text(json.dumps({"prompt": "How many?", "reference": "Paris"}) + "\n")
    assert value("Paris", rule="exact", references=str(known)) == 1.0
    assert value("Rome", "Rome", rule="exact", references=str(known)) == 1.0  # the item's own comes first
    (score,) = made('[{"rule": "exact"}]').score([item("Paris")])
    assert score == Score(reason="the rule exact: no reference answer is known for this prompt")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"a": 1}', 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('Here: {"a": 1}', 0.0),
        ('{"a": NaN}', 0.0),
        ("[" * 200_000, 0.0),
        ('{"b": 1}', 0.0),
        ("[1]", 0.0),
    ],
)
def test_json_with_keys(response: str, expected: float) -> None:
    assert value(response, rule="json", keys=["a"]) == expected


def own_rule(messages: list[dict[str, str]], response: str, reference: str | None, per_character: float = 1) -> float:
    if response == "raise":
        raise KeyError("no")
    return math.nan if response == "nan" else per_character * len(response)


def test_a_function_of_the_user() -> None:
    rule = {"rule": "function", "function": f"{__name__}:own_rule", "options": {"per_character": 0.5}}
    scores = made(json.dumps([rule, {"rule": "json", "weight": 10}])).score([item("1234"), item("raise"), item("nan")])
    assert scores[0] == Score(value=12.0)
    assert scores[1].value is None and "raised KeyError" in str(scores[1].reason)
    assert scores[2].value is None and "returned nan" in str(scores[2].reason)


def test_identity_is_that_of_rules_and_files(tmp_path: Path) -> None:
    def identity(**rule: Any) -> str:
        return made(json.dumps([rule])).health.weights_sha256

    assert identity(rule="json") == identity(rule="json", weight=1.0) != identity(rule="json", weight=2.0)
    known = tmp_path / "known.jsonl"
    known.write_text('{"prompt": "a", "reference": "b"}\n')
    before = identity(rule="exact", references=str(known))
    known.write_text('{"prompt": "a", "reference": "c"}\n')
    assert identity(rule="exact", references=str(known)) != before


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ("[]", "no rule is given"),
        ('[{"rule": "lenght"}]', "lenght"),
        ('[{"rule": "regex", "pattern": "("}]', "the rule regex"),
        ('[{"rule": "exact", "pattern": "a"}]', "has no group"),
        ('[{"rule": "function", "function": "no_such_module:f"}]', "no_such_module"),
        ('[{"rule": "function", "function": "math:no_such"}]', "no_such"),
        ('[{"rule": "length", "maximum": 3}]', "maximum"),
        ("[{", "rules"),
        ("/no/such/file.yaml", "No such file"),
    ],
)
def test_rules_that_cannot_be_applied_are_named(rules: str, says: str) -> None:
    with pytest.raises(ModelRefused, match=says):
        made(rules)


@pytest.mark.service
def test_rules_are_served_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("- {rule: length, max: 4}\n- {rule: regex, pattern: Paris, weight: 2}\n")
    items = [
        ([{"role": "user", "content": "Where?"}], text) for text in ("Paris", "Rome", "one " * 6, "\ud800", "x" * 10**6)
    ]
    with serving_rules(path) as url, RewardClient(url) as client:
        assert client.score(items) == [3.0, 1.0, 0.5, None, 1.0]
        assert client.health().kind == "rules"
    code = "import sys, reward.rules, reward.judge, reward.app; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
