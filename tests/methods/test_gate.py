import numpy as np
import pytest

from selfplay.methods import gate


def test_wins_count_ties_half():
    assert gate.wins([1, 2, 3], [0, 2, 4]).tolist() == [1, 0.5, 0]


def test_the_bootstrap_interval_of_a_share():
    """400 of 1,000 wins: standard error √(.4·.6/1000) = .0155, so ± .0304 at 95 %."""
    low, high = gate.bootstrap([1.0] * 400 + [0.0] * 600, 4000, 0.95, seed=0)
    assert low == pytest.approx(0.4 - 0.0304, abs=0.003)
    assert high == pytest.approx(0.4 + 0.0304, abs=0.003)
    assert gate.bootstrap([1.0] * 9, 200, 0.95, 0) == (1.0, 1.0)


def test_a_bootstrap_in_parts_draws_the_same(monkeypatch):
    values = np.random.default_rng(1).random(129)
    whole = gate.bootstrap(values, 500, 0.9, 5)
    monkeypatch.setattr(gate, "AT_ONCE", 1000)
    assert gate.bootstrap(values, 500, 0.9, 5) == whole


def test_the_length_controlled_win_rate_takes_length_out():
    """Wins made with a known logit 0.4 + 2·Δlog length: at equal length σ(.4) = .599, raw much higher for long answers."""
    rng = np.random.default_rng(0)
    champion = np.full(4000, 20.0)
    length = champion * np.exp(rng.normal(0.5, 0.3, 4000))
    logit = 0.4 + 2 * np.log(length / champion)
    won = (rng.random(4000) < 1 / (1 + np.exp(-logit))).astype(float)
    assert won.mean() > 0.75
    assert gate.length_controlled(won, length, champion) == pytest.approx(0.599, abs=0.05)
    assert 0.97 < gate.length_controlled([1.0] * 8, [9] * 8, [9] * 8) <= 1  # separable data have a finite fit
    assert gate.length_controlled([1.0, 0.0], [9, 9], [9, 9]) == pytest.approx(0.5)


def test_distinct_and_kl_by_hand():
    """Bigrams (1,2) (2,1) (1,2) and (1,2): 2 distinct of 4."""
    assert gate.distinct_n([[1, 2, 1, 2], [1, 2], [7]]) == 0.5
    assert gate.distinct_n([[1]]) == 0.0
    assert gate.kl_estimate([-1.0, -2.0], [-2.0, -5.0]) == 2.0


def test_the_power_of_the_win_rate_rule():
    """At true rate .47 + z·σ the bound lies at .47 on average: half of such candidates pass. p = .6, n: σ = .13/1.96."""
    n = round(0.24 / ((0.6 - 0.47) / 1.959964) ** 2)
    assert gate.power(n, 0.6, 0.47, 0.95) == pytest.approx(0.5, abs=0.01)
    assert gate.power(10_000, 0.6, 0.47, 0.95) > 0.999 > 0.03 > gate.power(384, 0.47, 0.47, 0.95)
    assert gate.power(10, 1.0, 0.47, 0.95) == 1.0 and gate.power(10, 0.1, 0.0, 0.95) == 1.0
