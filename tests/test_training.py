import pytest

from selfplay.config import TrainConfig
from selfplay.training import alarms

QUIET = {"train/beta": 0.1, "train/beta_at_limit": 0.0, "train/chosen_drop": 49.0}


def test_a_quiet_step_alarms_nobody() -> None:
    assert alarms(QUIET, TrainConfig()) == {}
    assert alarms({}, TrainConfig()) == {}


@pytest.mark.parametrize("limit", [50.0, 20.0, None])
def test_a_drop_of_the_chosen_alarms_past_its_limit(limit: float | None) -> None:
    found = alarms(QUIET | {"train/chosen_drop": 50.5}, TrainConfig(max_chosen_drop=limit))
    assert set(found) == (set() if limit is None else {"chosen_drop"})
    if limit is not None:
        assert "lost 50.5 nats" in found["chosen_drop"] and f"is {limit:g}" in found["chosen_drop"]


def test_a_beta_at_its_limit_alarms() -> None:
    found = alarms(QUIET | {"train/beta": 1e-4, "train/beta_at_limit": 1.0}, TrainConfig())
    assert set(found) == {"beta_at_limit"} and "0.0001" in found["beta_at_limit"]
