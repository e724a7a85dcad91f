"""Which base pairs are kept."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
from pairs_world import base, many, response

from selfplay import kinds
from selfplay.config import PairsConfig
from selfplay.errors import ConfigError
from selfplay.pairs.selection import margin_arrays, read_margins, select
from selfplay.storage import tables
from selfplay.types import RankedPair


def test_selection_keeps_the_configured_share_and_says_why():
    made = many(100, np.random.default_rng(0))
    for selection in ("potential", "explicit", "implicit", "random"):
        chosen = select(made, PairsConfig(selection=selection, keep=0.4), seed=1)
        assert sum(p.kept_because == "base" for p in chosen) == 40
        assert sum(p.dropped_because == selection for p in chosen) == 60
        assert all(p.potential is not None for p in chosen)
    explicit = select(made, PairsConfig(selection="explicit"), 1)
    assert min(p.explicit_margin for p in explicit if p.kept_because) > max(
        p.explicit_margin for p in explicit if p.dropped_because
    )
    random = [[bool(p.kept_because) for p in select(made, PairsConfig(selection="random"), s)] for s in (1, 1, 2)]
    assert random[0] == random[1] != random[2]


def test_the_signed_option_ranks_a_pair_that_the_policy_has_the_wrong_way_round_first():
    """Two pairs with equal explicit margins; the policy prefers the rejected response in the first one."""
    wrong = base([response(1.0, index=0, logp=-8.0), response(0.0, index=1, logp=-2.0)])[0]
    right = base([response(1.0, index=0, logp=-2.0), response(0.0, index=1, logp=-7.0)])[0]
    rows = [*wrong, *right]
    absolute = select(rows, PairsConfig(keep=0.5), 0)
    signed = select(rows, PairsConfig(keep=0.5, signed=True), 0)
    assert [bool(p.kept_because) for p in absolute] == [False, True]
    assert [bool(p.kept_because) for p in signed] == [True, False]


def test_a_small_set_uses_the_statistics_of_recent_rounds():
    rng = np.random.default_rng(0)
    few, recent = many(5, rng), many(200, rng)
    alone, together = select(few, PairsConfig(), 0), select(few, PairsConfig(), 0, margin_arrays(recent, False))
    everything = [p.explicit_margin for p in [*few, *recent]], [p.implicit_margin for p in [*few, *recent]]
    m = few[0]
    by_hand = (m.explicit_margin - np.mean(everything[0])) / np.std(everything[0]) - (
        m.implicit_margin - np.mean(everything[1])
    ) / np.std(everything[1])
    assert math.isclose(together[0].potential, by_hand)
    assert alone[0].potential != together[0].potential
    enough = many(64, rng)
    assert select(enough, PairsConfig(), 0) == select(enough, PairsConfig(), 0, margin_arrays(recent, False))


def test_margins_of_earlier_rounds_leave_out_pairs_that_were_unfit_for_a_ranking(tmp_path):
    """Of a pair that lost its ranking the margin counts; of one within the noise, or disputed, it does not."""
    made = many(4, np.random.default_rng(3))
    whys = ("potential", "noise", None, "disagreement")
    rows = [RankedPair(**{**_fields(p), "dropped_because": why}) for p, why in zip(made, whys, strict=True)]
    tables.write_rows(tmp_path / "pairs.parquet", rows, RankedPair)
    for signed in (False, True):
        found = read_margins(tmp_path / "pairs.parquet", signed)
        expected = margin_arrays([rows[0], rows[2]], signed)
        assert [a.tolist() for a in found] == [a.tolist() for a in expected]


def test_a_non_finite_margin_is_set_aside():
    rows = many(3, np.random.default_rng(1)) + base([response(1.0, logp=-math.inf), response(0.0, index=1)])[0]
    chosen = select(rows, PairsConfig(keep=1.0), 0)
    assert [p.dropped_because for p in chosen] == [None, None, None, "nonfinite"]


def test_a_metric_of_ones_own_is_a_module_and_a_line_in_the_table(monkeypatch):
    """This one prefers what the policy finds hard: the lowest reward of the chosen response is of no account to it."""
    own = ModuleType("narrowest")
    own.score = lambda margins: -margins.explicit
    monkeypatch.setitem(sys.modules, "narrowest", own)
    monkeypatch.setitem(kinds.SELECTIONS, "narrowest", "narrowest")
    made = many(10, np.random.default_rng(0))
    chosen = select(made, PairsConfig(selection="narrowest", keep=0.4), 0)
    kept = [p.explicit_margin for p in chosen if p.kept_because]
    assert kept == [p.explicit_margin for p in made if p.explicit_margin <= max(kept)] and len(kept) == 4
    assert {p.dropped_because for p in chosen} == {None, "narrowest"}
    assert all(p.potential is not None for p in chosen)


def test_an_implicit_reward_of_ones_own_is_a_module_and_a_line_in_the_table(monkeypatch):
    """Its reward is the summed log-probability, times β = .1: .1·(−6) − .1·(−2) = −.4."""
    own = ModuleType("summed")
    own.NEEDS_REFERENCE = False
    own.reward = lambda logp, n_tokens, reference_logp, beta: beta * logp
    monkeypatch.setitem(sys.modules, "summed", own)
    monkeypatch.setitem(kinds.IMPLICIT_REWARDS, "summed", "summed")
    (pair,), _ = base([response(1.0, index=0, logp=-6.0), response(0.0, index=1, logp=-2.0)], implicit="summed")
    assert math.isclose(pair.implicit_signed, -0.4)


def test_a_kind_that_is_not_in_the_table_is_refused_with_those_that_are(tmp_path):
    from mini import TINY

    from selfplay.config import load

    with pytest.raises(ConfigError, match=r"pairs\.selection: .*potential.*random"):
        load(TINY, ["pairs.selection=potental"])
    with pytest.raises(ConfigError, match=r"pairs\.implicit: .*simpo.*dpo"):
        load(TINY, ["pairs.implicit=ipo"])


def _fields(pair):
    return {name: getattr(pair, name) for name in tables.schema(RankedPair).names}
