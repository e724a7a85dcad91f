"""Threads of each role on a machine without a GPU."""

import os

import pytest
from mini import TINY

from selfplay.config import load
from selfplay.processes import cores

RULES = ("reward.model=null", "reward.rules=[{rule: length, max: 9}]")
OWN = ("train.cpu_threads=null", "generate.engine.cpu_threads=null")


@pytest.mark.parametrize(
    ("there", "settings", "trainer", "engine", "together"),
    [
        (2, (), 2, 1, False),  # a reward model of ours scores while it samples, on a core of its own
        (2, RULES, 2, 2, False),  # rules take next to nothing
        (1, (), 1, 1, False),
        (8, ("generate.engines=3",), 8, 2, False),
        (8, ("train.cpu_threads=2", "generate.engine.cpu_threads=6"), 2, 6, True),
        (8, ("train.cpu_threads=2", "generate.engine.cpu_threads=7"), 2, 7, False),
        (8, ("train.cpu_threads=2", "generate.engines=3", "generate.engine.cpu_threads=2"), 2, 2, True),
    ],
)
def test_a_role_has_the_cores_that_nobody_else_uses_while_it_works(
    monkeypatch, there, settings, trainer, engine, together
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(there)))
    config = load(TINY, [*OWN, *settings])
    assert (cores.trainer_threads(config), cores.engine_threads(config)) == (trainer, engine)
    assert cores.fit_together(config) is together
