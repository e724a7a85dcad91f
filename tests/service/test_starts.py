"""What the end of a schedule asks of the ledger: sums that it keeps, never a walk over all rounds."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from selfplay.config import Config, PlacementConfig, load
from selfplay.service.starts import Starts, devices
from selfplay.storage.ledger import Store
from selfplay.storage.reader import CURRENT

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path):
    """A run of three rounds, of which the second was rejected and the third given up."""
    store = Store(tmp_path)
    for index, state in ((1, "promoted"), (2, "rejected"), (3, "cancelled")):
        store.open_round(index, 0, (0, 0), "f", {})
        store.record_stage(index, "generate", 1800.0, {"tokens": 100})
        if state != "cancelled":
            store.record_stage(index, "evaluate", 1800.0, {"reward": 0.4 if index == 1 else 0.9, "tokens": 20})
        store.close_round(index, state, 1, [])
    serve(store, 1)
    yield store
    store.close()


def serve(store: Store, version: int) -> None:
    store.set_state(CURRENT, {"version": version, "before": None})


def why(store: Store, end: str, config: Config | None = None) -> str | None:
    config = config or load(TINY, [f"schedule.end={{{end}}}"])
    found = Starts(NOON).why_not(config, store, store.last_rounds(1)[0], NOON)
    return found[1] if found and found[0] == "ended" else None


def test_a_round_that_was_given_up_does_not_count(store):
    assert "its 2 rounds" in (why(store, "rounds: 2") or "") and why(store, "rounds: 3") is None


def test_the_reward_target_is_for_the_policy_that_serves(store):
    """Round 2 was rejected. After a roll-back it is the reward of the policy that serves; the initial policy has none."""
    assert why(store, "reward: 0.5") is None
    assert "reward is 0.4" in (why(store, "reward: 0.4") or "")
    reached = []
    for version in range(3):
        serve(store, version)
        reached.append(why(store, "reward: 0.5") is not None)
    assert reached == [False, False, True]


def test_budgets_count_every_round_and_a_stage_that_was_done_again_once(store):
    assert "340 tokens" in (why(store, "tokens: 340") or "") and why(store, "tokens: 341") is None
    assert "2.5 device-hours" in (why(store, "device_hours: 2.5") or "") and why(store, "device_hours: 2.51") is None
    store.record_stage(1, "generate", 3600.0, {"tokens": 130})
    assert "370 tokens" in (why(store, "tokens: 370") or "") and why(store, "tokens: 371") is None
    assert "3.0 device-hours" in (why(store, "device_hours: 3") or "")


def test_devices_are_those_of_the_placement_or_all_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert devices(PlacementConfig()) == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices(PlacementConfig()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert devices(PlacementConfig(generator=[0, 1], trainer=[2], reward=[2])) == 3
