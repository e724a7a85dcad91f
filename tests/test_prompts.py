import pytest

from selfplay import prompts
from selfplay.errors import InputError

POOL = [f"p{i}" for i in range(10)]


def test_every_prompt_once_an_epoch_in_another_order_each_time():
    cursor, epochs = (0, 0), []
    for _ in range(2):
        drawn = []
        for _ in range(5):
            got, cursor = prompts.draw(POOL, cursor, 2, 7, "reshuffle")
            drawn += got
        assert sorted(drawn) == POOL
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert prompts.draw(POOL, (0, 0), 10, 7, "stop")[0] == epochs[0] != prompts.draw(POOL, (0, 0), 10, 8, "stop")[0]


def test_a_draw_over_the_end_of_an_epoch_has_no_prompt_twice():
    got, (epoch, _) = prompts.draw(POOL, (0, 7), 8, 0, "reshuffle")
    assert len(set(got)) == 8
    assert epoch == 1
    assert len(prompts.draw(POOL, (0, 0), 99, 0, "reshuffle")[0]) == 10


def test_the_end_of_the_prompts_can_be_the_end():
    got, cursor = prompts.draw(POOL, (0, 7), 8, 0, "stop")
    assert len(got) == 3
    with pytest.raises(InputError, match="drawn once"):
        prompts.draw(POOL, cursor, 8, 0, "stop")


def test_a_subset_is_seeded():
    assert prompts.subset(POOL, 3, 1, "gate") == prompts.subset(POOL[::-1], 3, 1, "gate")
    assert prompts.subset(POOL, 3, 1, "gate") != prompts.subset(POOL, 3, 2, "gate")
