from collections import Counter

import pytest

from selfplay.errors import InputError
from selfplay.prompts import draw as prompts
from selfplay.types import Prompt

POOL = [f"p{i}" for i in range(10)]


def prompt(name, joined=None):
    return Prompt(prompt_id=name, messages=[], prompt_ids=[], split="train", joined=joined)


class History:
    """Rounds that draw from a pool, as the ledger and the artifacts would tell it."""

    def __init__(self, pool, seed=7, at_end="reshuffle"):
        self.pool, self.seed, self.at_end = [prompt(p) for p in pool], seed, at_end
        self.rounds, self.opened = [], {}

    @property
    def drawn(self):
        return Counter(p for round_ in self.rounds for p in round_)

    def open(self):
        """Open the next round, as of the prompts that were there before."""
        known = {p.prompt_id: p.joined for p in self.pool if (p.joined or 0) <= len(self.rounds)}
        levels = prompts.levels(known, self.drawn, self.opened, self.seed)
        self.opened[len(self.rounds) + 1] = prompts.cursor(levels)

    def levels(self):
        self.open()
        return prompts.levels({p.prompt_id: p.joined for p in self.pool}, self.drawn, self.opened, self.seed)

    def draw(self, count):
        got = prompts.draw(self.levels(), self.drawn, count, self.seed, self.at_end)
        self.rounds.append(got)
        return got

    def join(self, names):
        self.pool += [prompt(name, len(self.rounds) + 1) for name in names]


def test_every_prompt_once_an_epoch_in_another_order_each_time():
    history, epochs = History(POOL), []
    for _ in range(2):
        drawn = [p for _ in range(5) for p in history.draw(2)]
        assert sorted(drawn) == POOL
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert History(POOL).draw(10) == epochs[0] != History(POOL, seed=8).draw(10)


def test_a_draw_over_the_end_of_an_epoch_has_no_prompt_twice_and_forgets_none():
    history = History(POOL)
    for count in (7, 8, 8, 7):
        assert len(set(history.draw(count))) == count
    assert set(history.drawn.values()) == {3}
    assert len(history.draw(99)) == 10


def test_the_end_of_the_prompts_can_be_the_end():
    history = History(POOL, at_end="stop")
    assert [len(history.draw(count)) for count in (7, 8)] == [7, 3]
    with pytest.raises(InputError, match="drawn once"):
        history.draw(8)
    history.join(["new", "newer"])
    assert sorted(history.draw(8)) == ["new", "newer"]


def test_the_cursor_is_the_epoch_and_what_was_drawn_of_it():
    """Three of ten, then eight: the other seven and one of the next epoch."""
    history = History(POOL)
    assert prompts.cursor(history.levels()) == (0, 0)
    history.draw(3)
    assert prompts.cursor(history.levels()) == (0, 3)
    history.draw(8)
    assert prompts.cursor(history.levels()) == (1, 1)


def test_prompts_that_join_take_nobodys_place():
    """What was there keeps its order among itself, and still comes once an epoch."""
    alone, grown = History(POOL), History(POOL)
    alone.draw(3), grown.draw(3)
    grown.join(["a", "b", "c"])
    rest = [p for _ in range(4) for p in alone.draw(2)][:7]
    both = [p for _ in range(5) for p in grown.draw(2)][:10]
    assert [p for p in both if p in POOL][:7] == [p for p in rest if p in both]
    for _ in range(20):
        grown.draw(3)
    counts = grown.drawn
    assert max(counts[p] for p in POOL) - min(counts[p] for p in POOL) <= 1
    # Those that joined count on from the epoch in which they did: they never catch up on what they missed.
    assert all(counts["p0"] - 2 <= counts[p] <= counts["p0"] + 1 for p in "abc")


def test_new_prompts_are_as_frequent_in_the_next_draws_as_in_the_pool():
    """900 of 1000 are drawn when 1000 join: of the rest of the epoch half is new, not ten elevenths."""
    history = History([f"p{i}" for i in range(1000)])
    history.draw(900)
    history.join([f"n{i}" for i in range(1000)])
    levels = history.levels()
    in_this_epoch = sum(level == 0 for p, level in levels.items() if p.startswith("n"))
    assert 70 < in_this_epoch < 130  # binomial: 100 ± 9.5
    assert set(levels.values()) == {0, 1}
    got = history.draw(100)
    assert 30 < sum(p.startswith("n") for p in got) < 70


def test_a_prompt_that_joins_an_untouched_pool_is_like_the_others():
    history = History(POOL)
    history.join(["a"])
    assert sorted(history.draw(11)) == sorted([*POOL, "a"])


def test_a_subset_is_seeded():
    assert prompts.subset(POOL, 3, 1, "gate") == prompts.subset(POOL[::-1], 3, 1, "gate")
    assert prompts.subset(POOL, 3, 1, "gate") != prompts.subset(POOL, 3, 2, "gate")
