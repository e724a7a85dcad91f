"""What a thinking policy says, by marks that are one special token, one plain token, or plain text over several tokens."""

import numpy as np
import pytest
from engine_world import tokenizer
from tokenizers import AddedToken

from selfplay.models.thinking import Thinking, metrics

MARKS = {"special": True, "plain": False, "text": None}


@pytest.fixture(params=MARKS)
def world(request):
    """A tokenizer, and what it makes of a text: its ids, and the text without special tokens, as the engine gives it."""
    found, special = tokenizer(), MARKS[request.param]
    if special is not None:
        found.add_tokens(
            [AddedToken(mark, special=special) for mark in ("<think>", "</think>")], special_tokens=special
        )

    def said(text):
        ids = np.array(found.encode(text, add_special_tokens=False), np.int32)
        return ids, found.decode(ids, skip_special_tokens=True)

    return found, said


def reader(found, **settings):
    return Thinking(found, **{"start": "<think>", "end": "</think>", "hidden": True, **settings})


def test_thoughts_are_hidden_and_counted_and_their_tokens_stay(world):
    found, said = world
    thought = "<think>the lazy dog: 1 < 2</think>"
    ids, text = said(f"{thought}\n\nThe fox </think> ✓ <think>jumps<eos>")
    read = reader(found).read(ids, text, opened=False)
    _, rest = said("The fox </think> ✓ <think>jumps<eos>")  # what is a special token is in no text
    assert (read.text, read.left) == (rest, True) and rest.startswith("The fox ") and rest.endswith("jumps")
    assert found.decode(ids[: read.thinking]).rstrip() in (thought, f"{thought}\n\n".rstrip())
    assert 0 < read.thinking < len(ids)
    shown = reader(found, hidden=False).read(ids, text, opened=False)
    assert (shown.text, shown.thinking, shown.left) == (text, read.thinking, True)


def test_the_prompt_may_have_opened_the_thoughts(world):
    found, said = world
    thinks = reader(found)
    assert thinks.opened(said("<bos>the fox<think>\n")[0].tolist())
    assert not thinks.opened(said("<bos>the fox<think>\n\n</think>\n\n")[0].tolist())
    ids, text = said("the lazy dog</think>jumps<eos>")
    read = thinks.read(ids, text, opened=True)
    assert (read.text, read.left) == ("jumps", True)
    assert thinks.read(ids, text, opened=False).thinking == 0  # an end mark alone ends nothing


def test_thoughts_that_never_end_are_no_answer(world):
    found, said = world
    ids, text = said("<think>the lazy dog jumps over<eos>")
    read = reader(found).read(ids, text, opened=False)
    assert (read.text, read.thinking, read.left) == ("", len(ids), False)
    assert reader(found, hidden=False).read(ids, text, opened=False).text == text
    ids, text = said("the quick brown fox <think> never <eos>")
    read = reader(found).read(ids, text, opened=False)  # it has not begun with thoughts
    assert (read.text, read.thinking, read.left) == (text, 0, True)


def test_how_many_think_and_for_how_long():
    assert metrics([None, None]) == metrics([]) == {}
    assert metrics([0, 10, None, 20, 0]) == {"thinking_share": 0.5, "thinking_tokens": 15.0}
    assert metrics([0]) == {"thinking_share": 0.0, "thinking_tokens": 0.0}
