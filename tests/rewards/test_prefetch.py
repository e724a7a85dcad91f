"""What is made ready while the one before is used."""

import contextlib
import threading

import pytest

from selfplay.rewards.prefetch import prefetched


def test_the_next_is_made_while_the_one_before_is_used():
    made = [threading.Event() for _ in range(3)]

    def source():
        for number, event in enumerate(made):
            event.set()
            yield number

    seen = []
    for number in prefetched(source()):
        assert number == 2 or made[number + 1].wait(5), "the caller has this one, and the next is made"
        seen.append(number)
    assert seen == [0, 1, 2]


def test_what_the_source_raises_comes_in_its_place():
    def source():
        yield 1
        raise ValueError("the second cannot be read")

    found = prefetched(source())
    assert next(found) == 1
    with pytest.raises(ValueError, match="second"):
        next(found)


def test_left_before_its_end_it_leaves_no_thread():
    with contextlib.closing(prefetched(iter(range(10)))) as found:
        next(found)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
