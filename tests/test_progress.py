"""How work tells what it waits for, and how long it will take."""

import pytest
from pairs_world import Told

from selfplay.progress import left, waiting


def test_a_stage_says_what_it_waits_for_while_it_does():
    said = []
    line = Told()
    line.update = lambda *, text: said.append(text)
    with waiting(line, "the engine"):
        said.append("it loads")
    assert said == ["waits for the engine", "it loads", ""]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s left"), (89.4, "89 s left"), (90, "2 min left"), (5399, "90 min left"), (5400, "1.5 h left")],
)
def test_what_is_left_in_words(seconds, words):
    assert left(seconds) == words
