"""Numbers and their limits: what is told, and what stops a round."""

import math

import pytest

from selfplay.config import GuardConfig, Limits
from selfplay.rewards.alarms import SIGNS, Alarm, alarms


def test_a_number_is_told_by_its_size_and_one_above_both_limits_is_a_stop_alone():
    """A number that is NaN is no alarm; an infinite one is."""
    values = {"ties": 0.6, "shift": 0.2, "length_correlation": -0.9, "saturation": math.nan, "probe_change": math.inf}
    limits = {
        "ties": Limits(warn=0.5, stop=0.7),
        "shift": Limits(warn=0.3),
        "length_correlation": Limits(warn=0.5, stop=0.8),
        "saturation": Limits(stop=0.0),
        "probe_change": Limits(stop=0.1),
    }
    assert [(a.name, a.level, a.limit) for a in alarms(values, limits)] == [
        ("ties", "warn", 0.5),
        ("length_correlation", "stop", 0.8),
        ("probe_change", "stop", 0.1),
    ]
    assert alarms({"ties": 1.0}, {"ties": Limits()}) == []


def test_a_number_at_its_limit_is_no_alarm():
    assert alarms({"ties": 0.5}, {"ties": Limits(warn=0.5, stop=0.5)}) == []


@pytest.mark.parametrize("name", [n for n, f in GuardConfig.model_fields.items() if f.annotation is Limits])
def test_every_limit_of_the_configuration_has_a_sentence(name):
    said = str(Alarm(name=name, value=0.12345, level="warn", limit=0.1))
    assert said == f"{SIGNS[name]} 0.123, limit 0.1 (guard.{name}.warn)"
