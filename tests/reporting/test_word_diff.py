import time

import pytest

from selfplay.reporting import word_diff
from selfplay.reporting.word_diff import compare, reveal


def text(parts, *kinds):
    return "".join(t for kind, t in parts if not kinds or kind in kinds)


def test_the_words_that_the_other_text_lacks_are_marked():
    left, right = compare("the cat sat on the mat", "the dog sat on a mat")
    assert left == [("same", "the "), ("other", "cat"), ("same", " sat on "), ("other", "the"), ("same", " mat")]
    assert right == [("same", "the "), ("other", "dog"), ("same", " sat on "), ("other", "a"), ("same", " mat")]


def test_nothing_of_a_text_is_lost_or_added():
    one, other = "a b  c\n\td — é!", "a, b  c\nd – é?"
    left, right = compare(one, other)
    assert (text(left), text(right)) == (one, other)
    assert compare("", "x") == ([], [("other", "x")])
    assert compare("", "") == ([], [])


def test_characters_that_cannot_be_seen_are_named():
    assert reveal([("same", "exe\u202egnp\u200b\u200b\u200b.\x00\n\t")]) == [
        ("same", "exe"), ("unseen", "U+202E"), ("same", "gnp"), ("unseen", "U+200B ×3"), ("same", "."), ("unseen", "U+0000"), ("same", "\n\t"),
    ]  # fmt: skip
    assert reveal([("same", "שלום 👩‍💻 नमस्ते")]) == [("same", "שלום 👩‍💻 नमस्ते")]


@pytest.mark.slow
def test_texts_made_to_take_long_or_to_have_many_parts_do_not():
    hostile = [
        "\u202e\u200b" * 50_000,
        "a b " * 25_000,
        "x" * 100_000,
        ",,." * 100,
        "".join(f"{i} " for i in range(20_000)),
    ]
    for one in hostile:
        for other in (*hostile, ".,," * 100):
            started = time.process_time()
            for parts in compare(one, other):
                assert len(parts) <= word_diff.MOST_PARTS + 1
            assert time.process_time() - started < 5
