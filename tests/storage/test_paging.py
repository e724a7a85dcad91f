import itertools
import math
import random

import pytest

from selfplay.errors import InputError
from selfplay.storage import figures, paging
from selfplay.storage.ledger import Store
from selfplay.storage.paging import PairFilter

ROUNDS, PAIRS = 6, 30
FIELDS = (
    "round",
    "row",
    "prompt_id",
    "explicit_margin",
    "implicit_margin",
    "potential",
    "kept_because",
    "dropped_because",
)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A ledger of pairs with many equal, missing and infinite values, and the same rows in memory."""
    store, rng, rows = Store(tmp_path_factory.mktemp("run")), random.Random(0), []
    for n, i in itertools.product(range(1, ROUNDS + 1), range(PAIRS)):
        noise, kept = rng.random() < 0.2, rng.random() < 0.5
        rows.append(
            {
                "round": n, "row": i, "prompt_id": f"p{rng.randrange(25)}",
                "explicit_margin": round(rng.random() * 3, 1) if rng.random() < 0.95 else math.inf,
                "implicit_margin": None if rng.random() < 0.1 else round(rng.random(), 1),
                "potential": None if noise else round(rng.gauss(0, 1), 1),
                "kept_because": "base" if kept and not noise else None,
                "dropped_because": "noise" if noise else None if kept else "potential",
            }
        )  # fmt: skip
    with store._engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", [tuple(row[name] for name in FIELDS) for row in rows]
        )
    yield store, rows
    store.close()


def passes(row, where):
    if (where.round not in (None, row["round"])) or (where.prompt_id not in (None, row["prompt_id"])):
        return False
    if where.kept is not None and (row["kept_because"] is not None) != where.kept:
        return False
    if where.reason is not None and where.reason not in (row["kept_because"], row["dropped_because"]):
        return False
    for name in paging.MARGINS:
        low, high = getattr(where, name)
        if (low, high) != (None, None) and row[name] is None:
            return False
        if (low is not None and row[name] < low) or (high is not None and row[name] > high):
            return False
    return True


def expected(rows, where, sort, descending):
    """What the pages together must hold, by sorting everything in memory; rows without a value come last."""

    def place(row):
        return (row["round"], row["row"]) if sort == "round" else (row[sort], row["round"], row["row"])

    found = [row for row in rows if passes(row, where)]
    valued = sorted((r for r in found if r[sort] is not None), key=place, reverse=descending)
    return valued + sorted(
        (r for r in found if r[sort] is None), key=lambda r: (r["round"], r["row"]), reverse=descending
    )


@pytest.mark.slow
def test_the_pages_together_are_the_whole_list_in_order_whatever_is_asked(index, monkeypatch):
    store, rows = index
    monkeypatch.setattr(paging, "EXAMINED", 17)
    rng = random.Random(1)
    ranges = [(None, None), (None, None), (0.2, None), (None, 1.1), (0.3, 1.5), (math.inf, None), (1.0, 1.0)]
    for _ in range(400):
        where = PairFilter(
            round=rng.choice([None, None, 3]), kept=rng.choice([None, True, False]), reason=rng.choice([None, None, "noise", "base"]),
            prompt_id=rng.choice([None, None, None, "p3"]), **{name: rng.choice(ranges) for name in paging.MARGINS},
        )  # fmt: skip
        sort, descending, limit = rng.choice(["round", *paging.MARGINS]), rng.random() < 0.5, rng.choice([1, 5, 7, 50])
        found, after = [], None
        for _ in range(1000):
            page = paging.pairs(store, where, sort, descending, after, limit)
            assert len(page.rows) <= limit
            found += page.rows
            if (after := page.next) is None:
                break
        assert found == expected(rows, where, sort, descending), (where, sort, descending, limit)


def test_a_page_examines_a_bounded_number_of_pairs(index, monkeypatch):
    store, rows = index
    monkeypatch.setattr(paging, "EXAMINED", 20)
    pages, after = 0, None
    while True:
        page = paging.pairs(store, PairFilter(reason="nothing has this"), "potential", True, after)
        assert page.rows == []
        pages += 1
        if (after := page.next) is None:
            break
    assert pages >= len(rows) // 20


@pytest.mark.parametrize("sort", ["round", *paging.MARGINS])
@pytest.mark.parametrize(
    "where", [PairFilter(), PairFilter(kept=True, explicit_margin=(1.0, None)), PairFilter(round=2, kept=False)]
)
def test_no_page_sorts_more_than_a_round(index, sort, where, monkeypatch):
    """The plan of every statement walks an index in order; only within one round is anything sorted."""
    store, _ = index
    asked = []
    query = store.query
    monkeypatch.setattr(store, "query", lambda text, **values: asked.append((text, values)) or query(text, **values))
    page = paging.pairs(store, where, sort, True, None, 5)
    paging.pairs(store, where, sort, True, page.next, 5)
    assert len(asked) >= 2
    for text, values in asked:
        plan = " | ".join(row["detail"] for row in query(f"EXPLAIN QUERY PLAN {text}", **values))
        if where.round is None:
            assert "TEMP B-TREE" not in plan, plan
            assert sort == "round" or f"COVERING INDEX pairs_by_{sort}" in plan, plan
        else:
            assert "PRIMARY KEY (round=?" in plan, plan


@pytest.mark.parametrize(
    "cursor",
    ["x", "", "bnVsbA", "W10", "WzEsMiwzLDRd", "WyJhIiwxLDJd", "WzEsMS41LDJd", "W05hTiwxLCJhIl0", "é", "W" * 400],
)
def test_a_cursor_that_no_page_gave_is_refused(index, cursor):
    with pytest.raises(InputError, match="cursor"):
        paging.pairs(index[0], PairFilter(), after=cursor)


def test_a_histogram_counts_what_is_finite(index):
    store, rows = index
    edges, kept, dropped = paging.histogram(store, 2, "explicit_margin", bins=4)
    values = [
        (r["explicit_margin"], r["kept_because"])
        for r in rows
        if r["round"] == 2 and math.isfinite(r["explicit_margin"])
    ]
    low, high = min(values)[0], max(v for v, _ in values)
    assert (edges[0], edges[-1], len(edges)) == (low, high, 5)
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        inside = [k for v, k in values if a <= v < b or (i == 3 and v == high)]
        assert abs(kept[i] - sum(k is not None for k in inside)) <= 1  # a value on an edge may fall on either side
    assert sum(kept) + sum(dropped) == len(values)
    assert paging.histogram(store, 99, "potential") == ([], [], [])


def test_a_histogram_of_one_value(tmp_path):
    store = Store(tmp_path)
    with store._engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO pairs VALUES (1, 0, 'p', 0.5, 0.5, 2.0, 'base', NULL), (1, 1, 'q', 0.5, 0.5, 2.0, NULL, 'x')"
        )
    assert paging.histogram(store, 1, "potential") == ([2.0, 2.0], [1], [1])
    store.close()


def test_standing_of_a_pair_in_its_round(index):
    store, rows = index
    values = sorted((r["potential"] for r in rows if r["round"] == 1 and r["potential"] is not None), reverse=True)
    one = next(r for r in rows if r["round"] == 1 and r["potential"] is not None)
    kept = min(r["potential"] for r in rows if r["round"] == 1 and r["kept_because"] and r["potential"] is not None)
    assert paging.standing(store, 1, one["row"]) == {
        "of": len(values),
        "rank": values.index(one["potential"]) + 1,
        "lowest_kept": kept,
    }
    assert paging.reasons(store, 1) == {
        why: n for why in ("potential", "base", "noise")
        if (n := sum(why in (r["kept_because"], r["dropped_because"]) for r in rows if r["round"] == 1))
    }  # fmt: skip


def test_lists_and_sums_of_a_run(tmp_path):
    store = Store(tmp_path)
    for n in (1, 2, 3):
        store.open_round(n, n - 1, (0, 0), "f", {"big": "x" * 100})
        store.record_stage(n, "generate", 2.0, {"tokens": n})
        store.record_stage(n, "train", 3.0, {"beta": 0.1 * n} if n < 3 else {})
        store.close_round(n, "rejected" if n == 2 else "promoted", n, ["why"] if n == 2 else [])
        store.event("engine_restart" if n == 2 else "note", f"event {n}", n)
    assert [(r["round"], r["seconds"], r["reasons"]) for r in paging.rounds(store)] == [
        (3, 5.0, []),
        (2, 5.0, ["why"]),
        (1, 5.0, []),
    ]
    assert [r["round"] for r in paging.rounds(store, before=3, limit=1)] == [2]
    assert "config" not in paging.rounds(store)[0]
    assert paging.round_(store, 2)["config"] == {"big": "x" * 100}
    assert paging.round_(store, 9) is None
    assert figures.metrics(store, ("train/beta", "generate/tokens"), first=2) == {
        2: {"generate/tokens": 2.0, "train/beta": 0.2},
        3: {"generate/tokens": 3.0},
    }
    assert figures.latest(store, ("train/beta", "generate/tokens", "absent")) == {
        "generate/tokens": 3.0,
        "train/beta": 0.2,
    }
    assert store.totals("stages") == {"generate": 6.0, "train": 9.0}
    assert store.totals("events") == {"engine_restart": 1, "note": 2}
    assert store.count_rounds() == {"promoted": 2, "rejected": 1}
    assert [e["text"] for e in paging.events(store, limit=2)] == ["event 3", "event 2"]
    assert [e["text"] for e in paging.events(store, before=3, kind="note")] == ["event 1"]
    assert [e["text"] for e in paging.events(store, index=2)] == ["event 2"]
    assert [e["id"] for e in paging.events_after(store, 1)] == [2, 3]
    assert paging.last_event(store) == 3
    store.submit("add_prompts", {"rows": [{"prompt": "a" * 1000}] * 5}, "api")
    store.submit("pause", {"after": "stage"}, "cli")
    assert [o["arguments"] for o in paging.orders(store)] == [{"after": "stage"}, {"prompts": 5}]
    assert paging.orders(store, state="done") == []
    (waits,) = store.pending(["add_prompts"])
    assert len(store.order(waits["id"])["arguments"]["rows"]) == 5
    store.answer(waits["id"], "done", "5 added")
    assert store.order(waits["id"])["arguments"] == {"prompts": 5}, (
        "the prompts are in the pool, and need no second place"
    )
    assert [o["arguments"] for o in paging.orders(store, state="done")] == [{"prompts": 5}]
    store.close()
