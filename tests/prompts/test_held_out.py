import random

import numpy as np
import pyarrow as pa
import pytest
from test_pool import conversation, prompt

from selfplay.prompts import held_out as held_outs
from selfplay.prompts.held_out import HeldOut
from selfplay.types import Prompt


def meets(old, new, ngram=8, overlap=0.5):
    """Whether a text meets a held-out one."""
    (found,) = HeldOut.of([prompt(old, "heldout")]).meets([prompt(new)], ngram, overlap)
    return found


def test_n_grams_in_common_by_hand():
    """Trigrams of «a b c d e f» : abc bcd cde def. «x b c d e y» has xbc bcd cde dey: 2 of 4."""
    assert meets("a b c d e f", "x b c d e y", 3, 0.5)
    assert not meets("a b c d e f", "x b c d e y", 3, 0.51)
    # Of the shorter text's two trigrams one is shared, however long the other is.
    assert meets("a b c d e f g h i j k l m n", "z j k l", 3, 0.5)
    assert not meets("a b c d e f g h i j k l m n", "z j k l", 3, 0.6)
    # A repeated n-gram counts once.
    assert not meets("a b c a b c a b c d e f g h", "a b c x y z x y", 3, 0.5)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("Hello!", "hello", True),  # the same words
        ("Hello!", "Say hello.", False),  # too short to say anything
        ("What is the capital of Norway?", "Please tell me: WHAT is the capital of norway – be brief.", True),
        ("Please tell me: What is the capital of Norway? Be brief.", "What is the capital of Norway?", True),
        ("What is the capital of Norway?", "Please tell me: What is the capital of Peru? Be brief.", False),
        ("Name three fruits.", "Name three fruits. Be brief.", False),  # three words are chance
        ("ＮＡＭＥ four　fruits now", "Please name four fruits now", True),
        ("挪威的首都是哪里?", "请告诉我,挪威的首都是哪里?", True),
        ("挪威的首都是哪里?", "秘鲁的首都是哪里?", False),
        ("???", "???", True),
        ("???", "!!!", False),
    ],
)
def test_what_meets_a_held_out_prompt(old, new, expected):
    assert meets(old, new) is expected


def test_a_held_out_conversation_is_met_by_what_its_user_says():
    messages = conversation("Tell me a story about a dog.", "Once …", "Now one about the cat next door.")
    found = HeldOut.of([Prompt(prompt_id="h", messages=messages, prompt_ids=[], split="heldout")])
    other = [
        {"role": "system", "content": "Be kind."},
        *conversation("tell me a story about a dog", "No.", "now one about the cat next door"),
    ]
    asking = [Prompt(prompt_id="x", messages=other, prompt_ids=[], split="train"), prompt("Tell me about your day.")]
    assert found.meets(asking, 8, 0.5) == [True, False]


class Plain:
    """The same with words in tuples, one prompt at a time."""

    def __init__(self, texts):
        self.texts = texts

    @staticmethod
    def grams(text, n):
        return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}

    def meets(self, text, ngram, overlap):
        if text in self.texts:
            return True
        longest = min(ngram, len(text))
        for n in range(min(held_outs.LEAST_WORDS, ngram), longest + 1):
            ours = self.grams(text, n)
            for other in self.texts:
                theirs = self.grams(other, n)
                counts = n == longest or len(other) <= n
                if counts and ours & theirs and len(ours & theirs) >= overlap * min(len(ours), len(theirs)):
                    return True
        return False


@pytest.mark.parametrize("most", [20, pytest.param(1 << 20, marks=pytest.mark.slow)])
def test_columns_of_words_say_what_tuples_of_words_say(monkeypatch, most):
    monkeypatch.setattr(held_outs, "MOST_WORDS", most)
    chance = random.Random(0)

    def text():
        return [chance.choice("abcdef") for _ in range(chance.randint(1, 14))]

    met = 0
    for _ in range(300):
        ngram, overlap = chance.choice([1, 2, 3, 4, 5, 8]), chance.choice([0.2, 0.5, 0.75, 1.0])
        texts, asking = [text() for _ in range(chance.randint(0, 8))], [text() for _ in range(6)]
        expected = [Plain(texts).meets(words, ngram, overlap) for words in asking]
        found = HeldOut.of([prompt(" ".join(words), "heldout") for words in texts])
        assert found.meets([prompt(" ".join(words)) for words in asking], ngram, overlap) == expected
        met += sum(expected)
    assert 300 < met < 1500


def test_an_ancestor_is_met_whatever_is_said():
    nothing = pa.array([np.array([1, 2], np.int32)], held_outs.WORDS)
    found = HeldOut(["eve"], nothing)
    asking = [prompt("Anything at all.", parent=parent) for parent in ("eve", "adam", None)]
    assert found.meets(asking, 8, 0.5) == [True, False, False]
