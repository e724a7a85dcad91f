"""Which policy a round's reference is, and where β starts."""

import pytest

from selfplay.config import EveryN, TrainConfig
from selfplay.errors import CheckpointError
from selfplay.rounds import reference
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.types import Policy


@pytest.fixture
def store(tmp_path):
    """Eight rounds; the fourth and the fifth were rejected, so that round 5 and 6 have the sampler of round 4."""
    made = Store(tmp_path)
    for index, sampler in enumerate((0, 1, 2, 3, 3, 3, 6, 7), 1):
        made.open_round(index, sampler, (0, 0), "f", {})
        made.close_round(index, "promoted", index, [])
    yield made
    made.close()


def test_the_reference_is_the_policy_that_sampled_the_round_it_began_with(store):
    previous, initial, third = (TrainConfig(reference=r) for r in ("previous", "initial", EveryN(every=3)))
    rounds = range(1, 9)
    assert [reference.began(previous, i) for i in rounds] == list(rounds)
    assert [reference.began(initial, i) for i in rounds] == [1] * 8
    assert [reference.began(third, i) for i in rounds] == [1, 1, 1, 4, 4, 4, 7, 7]
    assert [reference.version(previous, i, store) for i in rounds] == [0, 1, 2, 3, 3, 3, 6, 7]
    assert [reference.version(initial, i, store) for i in rounds] == [0] * 8
    assert [reference.version(third, i, store) for i in rounds] == [0, 0, 0, 3, 3, 3, 6, 6]


def test_a_reference_whose_weights_are_gone_is_an_error_that_says_what_to_do(store, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"the reference of round 5 is policy 3 \(train\.reference\), and"
    ) as error:
        reference.policy(TrainConfig(reference=EveryN(every=3)), 5, store, Policies(tmp_path))
    assert "set train.reference to previous or initial" in error.value.hint


def test_beta_goes_on_against_the_same_reference_and_begins_anew_against_another():
    def first(rule, index, trained_in, beta, **limits):
        settings = TrainConfig(reference=rule, beta=0.1, **limits)
        sampler = Policy(version=trained_in, path="/p", parent=None, round=trained_in, beta=beta, reference=None)
        return reference.first_beta(settings, index, sampler)

    assert first("previous", 3, 2, 0.07) == 0.1  # the reference is refreshed every round
    assert first("initial", 3, 2, 0.07) == 0.07
    assert first("initial", 1, 0, None) == 0.1  # the initial policy was not trained
    assert first(EveryN(every=3), 4, 3, 0.07) == 0.1  # round 4 begins with a new reference
    assert first(EveryN(every=3), 5, 4, 0.07) == 0.07
    assert first(EveryN(every=3), 6, 3, 0.07) == 0.1  # rounds 4 and 5 were rejected
    assert first("initial", 3, 2, 0.07, beta_min=0.08) == 0.08
    assert first("initial", 3, 2, 0.7, beta_max=0.2) == 0.2
