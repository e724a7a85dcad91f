import json
import sys
import types

import pytest
from mini import TINY

from selfplay import trackers
from selfplay.config import load
from selfplay.errors import ConfigError

HISTORY = [{"step": 1, "train/loss": 0.7, "train/beta": 0.1}, {"step": 2, "train/loss": 0.6, "train/beta": None}]


def test_rounds_and_steps_come_back_from_tensorboard(tmp_path):
    tracker = trackers.open_tracker(load(TINY), tmp_path, "4f2a")
    trackers.log_round(tracker, 3, {"evaluate/win_rate": 0.625, "train/loss": float("nan")}, HISTORY, first_step=21)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(found.Tags()["scalars"]) == ["round/evaluate/win_rate", "train/beta", "train/loss"]
    assert [(e.step, e.value) for e in found.Scalars("round/evaluate/win_rate")] == [(3, 0.625)]
    assert [e.step for e in found.Scalars("train/loss")] == [21, 22]
    assert [e.step for e in found.Scalars("train/beta")] == [21]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_the_same_by_the_same_calls(name, tmp_path, monkeypatch):
    """A stand-in at the boundary to the package, which need not be installed; it keeps what it is given."""
    calls: list[tuple[str, object]] = []
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace()  # what find_spec looks at
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values: calls.append(("log", values))
    module.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, module)
    tracker = trackers.open_tracker(load(TINY, [f"track={name}"]), tmp_path, "4f2a")
    trackers.log_round(tracker, 1, {"evaluate/win_rate": 0.5}, HISTORY[:1], first_step=1)
    tracker.close()
    assert [what for what, _ in calls] == ["init", "log", "log", "finish"]
    options = calls[0][1]
    assert options["project"] == "selfplay" and options["resume"] == "allow"
    assert options["id" if name == "wandb" else "name"] == "tiny-4f2a"
    assert json.dumps(calls[0][1]["config"])
    assert calls[1][1] == {"round/evaluate/win_rate": 0.5, "round/step": 1}
    assert calls[2][1] == {"train/loss": 0.7, "train/beta": 0.1, "train/step": 1}


def test_a_tracker_that_is_not_installed_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises((ConfigError, ValueError), match="trackio"):
        trackers.require("trackio")
    trackers.require("none")
    trackers.require("tensorboard")
