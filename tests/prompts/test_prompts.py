import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import plain_draws
import pytest

from selfplay.config import BreadthConfig, PromptsConfig
from selfplay.errors import InputError
from selfplay.prompts import draw, draws, formats, pool
from selfplay.prompts import orders as orders_module
from selfplay.prompts.orders import Orders
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.types import Drawn, Prompt

POOL = [f"p{i}" for i in range(10)]


def conversation(name):
    return [{"role": "user", "content": name}]


def prompt(name, joined=None, split="train"):
    messages = conversation(name)
    return Prompt(
        prompt_id=formats.prompt_id(messages), messages=messages, prompt_ids=[1, 2], split=split, joined=joined
    )


class Line:
    def update(self, **fields):
        return


class History:
    """Rounds that draw from a real pool with a real ledger; prompts go by their names."""

    def __init__(self, folder, names, seed=7, at_end="reshuffle"):
        (folder / "pool").mkdir(parents=True)
        self.folder, self.seed, self.at_end = folder, seed, at_end
        tables.write_rows(folder / "pool" / pool.OLD, [prompt(name) for name in names], Prompt)
        self.store, self.rounds, self.opened = Store(folder), [], {}
        self.names = {prompt(name).prompt_id: name for name in names}
        self.start()

    def start(self):
        """A new process opens the folder."""
        self.pool = pool.Pool(self.folder / "pool")
        orders = Orders(self.seed, self.folder / "pool" / pool.ORDERS)
        self.draws = draws.Draws(self.pool, self.store, self.folder / "rounds", orders)

    @property
    def drawn(self):
        return Counter(p for round_ in self.rounds for p in round_)

    def open(self):
        index = len(self.rounds) + 1
        if index not in self.opened:
            self.opened[index] = self.draws.cursor(index)
            self.store.open_round(index, 0, self.opened[index], "", {})
        return index

    def levels(self):
        found = self.draws.levels(self.open())
        return {
            self.names[i]: level for i, level in zip(formats.names(found.hashes), found.level.tolist(), strict=True)
        }

    def stage(self, count, **more):
        """The stage `prompts` of the open round; returns its metrics."""
        out = self.folder / "rounds" / f"{self.open():04d}" / "prompts"
        out.mkdir(parents=True)
        settings = PromptsConfig(source="x", per_round=count, at_end=self.at_end)
        fields = {"breadth": BreadthConfig(), "embed": None, **more}
        return draw.prompts(
            out, Line(), pool=self.pool, draws=self.draws, index=len(self.rounds) + 1, settings=settings, **fields
        )

    def said(self, file):
        path = self.folder / "rounds" / f"{len(self.rounds) + 1:04d}" / "prompts" / f"{file}.parquet"
        return [self.names[i] for i in tables.read_column(path, "prompt_id")]

    def draw(self, count, record=True):
        self.stage(count)
        got = self.said("prompts")
        if record:
            self.draws.record(len(self.rounds) + 1)
        self.rounds.append(got)
        return got

    def join(self, names):
        self.names |= {prompt(name).prompt_id: name for name in names}
        self.pool.join([prompt(name, len(self.rounds) + 1) for name in names])


@pytest.fixture
def history(tmp_path):
    made = []

    def make(names=POOL, **more):
        made.append(History(tmp_path / str(len(made)), names, **more))
        return made[-1]

    yield make
    for one in made:
        one.store.close()


@pytest.mark.parametrize("record", [True, False])
def test_what_the_next_round_draws_is_known_before_it_opens(history, record):
    """Over the end of an epoch, and with prompts that join while the round before is open."""
    one = history()
    for joining in ([], ["a", "b", "c"], [], ["d"]):
        one.draw(4, record)
        one.join(joining)  # they are of the next round on
        ahead = draw.drawn_ahead(one.draws, len(one.rounds) + 1, PromptsConfig(source="x", per_round=4))
        assert [one.names[i] for i in ahead] == one.draw(4)


def test_every_prompt_once_an_epoch_in_another_order_each_time(history):
    one, epochs = history(), []
    for _ in range(2):
        drawn = [p for _ in range(5) for p in one.draw(2)]
        assert sorted(drawn) == POOL
        epochs.append(drawn)
    assert epochs[0] != epochs[1]
    assert history().draw(10) == epochs[0] != history(seed=8).draw(10)


def test_a_draw_over_the_end_of_an_epoch_has_no_prompt_twice_and_forgets_none(history):
    one = history()
    for count in (7, 8, 8, 7):
        assert len(set(one.draw(count))) == count
    assert set(one.drawn.values()) == {3}
    assert len(one.draw(99)) == 10


def test_the_end_of_the_prompts_can_be_the_end(history):
    one = history(at_end="stop")
    assert [len(one.draw(count)) for count in (7, 8)] == [7, 3]
    with pytest.raises(InputError, match="drawn once"):
        one.stage(8)
    (one.folder / "rounds" / "0003" / "prompts").rmdir()
    one.join(["new", "newer"])
    assert one.levels().keys() >= {"new", "newer"}
    assert sorted(one.draw(8)) == ["new", "newer"]


def test_the_cursor_is_the_epoch_and_what_was_drawn_of_it(history):
    """Three of ten, then eight: the other seven and one of the next epoch."""
    one = history()
    assert one.draws.cursor(1) == (0, 0)
    assert one.stage(3) == {"count": 3, "epoch": 0, "offset": 3, "pool": 10}
    one.draws.record(1)
    one.rounds.append(one.said("prompts"))
    assert one.draws.cursor(2) == (0, 3)
    one.draw(8)
    assert one.draws.cursor(3) == (1, 1)


@pytest.mark.slow
def test_prompts_that_join_take_nobodys_place(history):
    """What was there keeps its order among itself, and still comes once an epoch."""
    alone, grown = history(), history()
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


def test_new_prompts_are_as_frequent_in_the_next_draws_as_in_the_pool(history):
    """900 of 1000 are drawn when 1000 join: of the rest of the epoch half is new, not ten elevenths."""
    one = history([f"p{i}" for i in range(1000)])
    one.draw(900)
    one.join([f"n{i}" for i in range(1000)])
    levels = one.levels()
    in_this_epoch = sum(level == 0 for p, level in levels.items() if p.startswith("n"))
    assert 70 < in_this_epoch < 130  # binomial: 100 ± 9.5
    assert set(levels.values()) == {0, 1}
    got = one.draw(100)
    assert 30 < sum(p.startswith("n") for p in got) < 70


def test_a_prompt_that_joins_an_untouched_pool_is_like_the_others(history):
    one = history()
    one.join(["a"])
    assert sorted(one.draw(11)) == sorted([*POOL, "a"])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_draws_are_those_that_a_dictionary_and_a_sort_would_make(history, seed):
    """Rounds of any size over several epochs, prompts that join, restarts, rounds that are given up, and both ends."""
    chance = random.Random(seed)
    one = history([f"p{i}" for i in range(chance.randint(3, 40))], seed=seed)
    pool_, opened, joins = dict.fromkeys(one.names), {}, 0
    for index in range(1, 25):
        one.at_end = chance.choice(["reshuffle", "reshuffle", "stop"])
        ids = {p: first for p, first in pool_.items() if (first or 0) < index}
        drawn = Counter(p for round_ in one.rounds for p in [prompt(name).prompt_id for name in round_])
        opened[index] = plain_draws.cursor(plain_draws.levels(ids, drawn, opened, seed))
        if chance.random() < 0.3:
            names = [f"n{joins + i}" for i in range(chance.randint(1, 15))]
            joins += len(names)
            one.join(names)
            pool_ |= {prompt(name).prompt_id: index for name in names}
        levels = plain_draws.levels(pool_, drawn, opened, seed)
        count = chance.randint(1, len(pool_) + 3)
        expected = [one.names[p] for p in plain_draws.draw(levels, drawn, count, seed, one.at_end)]
        assert one.levels() == {one.names[p]: level for p, level in levels.items()}
        assert one.opened[index] == opened[index]
        if not expected or chance.random() < 0.15:  # it is given up before it draws
            one.rounds.append([])
        else:
            assert one.draw(count, record=chance.random() < 0.8) == expected
        if chance.random() < 0.3:
            one.start()


def test_a_round_that_is_killed_anywhere_draws_the_same(history):
    one, calm = history(), history()
    expected = [calm.draw(4) for _ in range(4)]
    one.draw(4), one.draw(4, record=False)  # killed between the end of the stage and its record
    one.start()
    got = one.draw(4, record=False)
    one.start()
    one.rounds.pop()
    one.draws.record(3), one.draws.record(3)
    out = one.folder / "rounds" / "0003" / "prompts"
    for file in out.iterdir():  # its folder was damaged, and is deleted to have it done again
        file.unlink()
    out.rmdir()
    assert one.draw(4) == got == expected[2]
    assert one.draw(4) == expected[3]


def test_folders_are_not_asked_once_the_ledger_knows(history):
    """What rounds have drawn may be deleted; a run that began without draws in the ledger is read from its folders once."""
    one, calm = history(), history()
    expected = [calm.draw(3) for _ in range(6)]
    for i in range(4):
        one.draw(3, record=i == 5)
    assert one.store.draw_before(99)["round"] == 3  # as of the last round that opened
    one.start()
    assert one.levels()
    for index in range(1, 5):
        for file in (one.folder / "rounds" / f"{index:04d}" / "prompts").iterdir():
            file.unlink()
    one.start()
    assert [one.draw(3) for _ in range(2)] == expected[4:]


@pytest.mark.slow
def test_the_ledger_keeps_little(history):
    """Of a pool of 20,000 a round keeps some hundred bytes, whatever was drawn."""
    one = history([f"p{i}" for i in range(20_000)])
    for count in (3000, 8192, 8192, 8192):
        one.draw(count)
    rows = [one.store.draw_before(index + 1) for index in range(1, 5)]
    assert [(row["epoch"], row["size"]) for row in rows] == [(0, 20_000)] * 2 + [(0, 20_000), (1, 20_000)]
    assert max(len(row["levels"]) for row in rows) < 2000


def test_a_draw_is_compressed_to_representatives(history):
    one = history()
    asked = []

    def embed(path, keep):
        asked.append((tables.read_column(path, "prompt_id"), keep))
        return {"kept": [1, 3, 4], "clusters": [0, 1, 1, 2, 0, 0], "distances": [0.5] * 6, "seconds": 1.5}

    metrics = one.stage(3, breadth=BreadthConfig(method="clusters", oversample=2.0), embed=embed)
    drawn = one.said("drawn")
    assert [[one.names[i] for i in ids] for ids, _ in asked] == [drawn] and asked[0][1] == 3
    assert one.said("prompts") == [drawn[1], drawn[3], drawn[4]]
    rows = tables.read_rows(one.folder / "rounds" / "0001" / "prompts" / "clusters.parquet", Drawn)
    assert [(row.cluster, row.kept) for row in rows] == [(0, False), (1, True), (1, False), (2, True), (0, True), (0, False)]  # fmt: skip
    assert metrics | {"cluster_evenness": 0} == {
        "count": 3, "epoch": 0, "offset": 6, "pool": 10, "drawn": 6, "passed_over": 3, "clusters": 3,
        "cluster_evenness": 0, "largest_cluster_share": 0.5, "seconds_embed": 1.5,
    }  # fmt: skip
    one.draws.record(1)
    one.rounds.append([])
    assert sum(one.levels().values()) == 6  # what was passed over counts as drawn


def test_places_are_those_of_the_seeds(tmp_path):
    hashes = np.array([0, 1, 2**63 - 1, 12345678901], np.int64)
    expected = [plain_draws.place(7, 3, name) for name in formats.names(hashes)]
    assert orders_module.places(7, 3, hashes).tolist() == expected
    assert Orders(7, None).order(3, hashes).tolist() == sorted(range(4), key=expected.__getitem__)
    assert orders_module.places(7, 3, hashes[:0]).tolist() == []


def test_an_order_is_kept_and_one_of_another_run_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(orders_module, "WORTH_KEEPING", 100)
    made = []
    real = orders_module.places
    monkeypatch.setattr(orders_module, "places", lambda *args: made.append(len(args[2])) or real(*args))
    hashes = np.random.default_rng(0).integers(0, 2**63 - 1, 1000)
    order = Orders(7, tmp_path / "orders").order(2, hashes[:900])
    assert made == [900] and [file.name for file in (tmp_path / "orders").iterdir()] == ["00000002-900.npz"]
    made.clear()
    assert (Orders(7, tmp_path / "orders").order(2, hashes[:900]) == order).all()
    assert (Orders(7, tmp_path / "orders").order(2, hashes[:500]) == order[order < 500]).all()
    grown = Orders(7, tmp_path / "orders").order(2, hashes)
    assert (grown[grown < 900] == order).all() and max(made) == 100
    assert [file.name for file in (tmp_path / "orders").iterdir()] == ["00000002-1000.npz"]
    made.clear()
    assert (Orders(8, tmp_path / "orders").order(2, hashes) != grown).any() and max(made) == 1000
    (damaged,) = (tmp_path / "orders").iterdir()
    content = bytearray(damaged.read_bytes())
    content[2000] ^= 1
    damaged.write_bytes(content)
    made.clear()
    Orders(8, tmp_path / "orders").order(2, hashes)
    assert max(made) == 1000
    Orders(7, tmp_path / "orders").order(4, hashes)
    assert [file.name for file in (tmp_path / "orders").iterdir()] == ["00000004-1000.npz"]


def test_levels_are_asked_of_a_pool_of_nobody():
    nobody = SimpleNamespace(training=lambda: (np.empty(0, np.int64), np.empty(0, np.int32)))
    ledger = SimpleNamespace(draw_before=lambda index: None)
    found = draws.Draws(nobody, ledger, None, Orders(1, None))
    assert found.cursor(1) == (0, 0)
    with pytest.raises(InputError, match="drawn once"):
        found.levels(1).next(found.orders, 3, "reshuffle")


def test_a_subset_is_seeded():
    assert draw.subset(POOL, 3, 1, "gate") == draw.subset(POOL[::-1], 3, 1, "gate")
    assert draw.subset(POOL, 3, 1, "gate") != draw.subset(POOL, 3, 2, "gate")
