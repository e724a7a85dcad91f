"""The questions of the tiny world, and the answers that its builder writes to them."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from selfplay.worlds.tiny import grade, questions
from selfplay.worlds.tiny.answers import Style, answer
from selfplay.worlds.tiny.skills import SKILLS

ROOT = Path(__file__).parents[2]


def test_questions_are_deterministic_and_distinct() -> None:
    code = "from selfplay.worlds.tiny import questions; print(hash(0), [q.text for q in questions.every(3, 0.2)])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    texts = [q.text for q in questions.every(3)]
    assert len(texts) == len(set(texts))
    assert texts != [q.text for q in questions.every(4)]


def test_the_pool_is_split_by_text_unbalanced_and_redundant() -> None:
    every = questions.every(0)
    held_out = {q.text for q in every if questions.held_out(q.text)}
    train = [q for q in every if q.text not in held_out]
    assert len(train) >= 4000
    assert len(held_out) >= 600
    # The same text in another world falls on the same side.
    assert all(questions.held_out(q.text) == (q.text in held_out) for q in questions.every(0) if q.text in held_out)

    skills = Counter(q.meta["skill"] for q in train)
    assert max(skills.values()) > 8 * min(skills.values())
    assert {q.meta["regime"] for q in train} == {"solved", "learnable", "hopeless", "noisy"}
    # Near-duplicates: the same thing asked in many wordings.
    asked = Counter((q.meta["skill"], q.meta["x"]) for q in train)
    assert sum(n for n in asked.values() if n >= 20) > len(train) / 3


@pytest.fixture(scope="module")
def small_world() -> list[questions.Question]:
    return questions.every(0, 0.3)


@pytest.mark.parametrize("name", sorted(SKILLS))
def test_right_answers_of_a_skill_beat_wrong_ones(name: str, small_world: list[questions.Question]) -> None:
    rng = random.Random(1)
    asked = [q for q in small_world if q.meta["skill"] == name]
    plain = Style()

    def mean(right: bool) -> float:
        return sum(grade([], answer(q, right, plain, rng), q.meta)["content"] for q in asked) / len(asked)

    assert mean(True) >= 0.75
    assert mean(False) <= 0.7
    assert mean(True) - mean(False) >= 0.25


def test_style_does_not_touch_the_content() -> None:
    rng = random.Random(2)
    for question in questions.every(0, 0.1):
        if question.meta["regime"] == "learnable":
            for tone in ("rude", "neutral", "polite"):
                text = answer(question, True, Style(tone=tone), rng)
                found = grade([], text, question.meta)
                assert found["content"] == pytest.approx(1.0), text
                assert found["tone"] in {"rude": (0.0,), "neutral": (0.5, 1.0), "polite": (1.0,)}[tone], text
