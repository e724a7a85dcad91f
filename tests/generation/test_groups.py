"""Which GPUs each engine has, and what cannot be met."""

import os

import pytest
from engine_world import config

from selfplay.config import GenerateConfig, PlacementConfig
from selfplay.errors import ConfigError
from selfplay.generation.groups import groups


def of(tmp_path, gpus, placement=None, **generate):
    found = config(tmp_path)
    settings = GenerateConfig.model_validate({**found.generate.model_dump(), **generate})
    changed = {"generate": settings, "placement": PlacementConfig.model_validate(placement or {})}
    return groups(found.model_copy(update=changed), gpus)


def test_a_number_splits_the_gpus_of_the_generator(tmp_path):
    pairs = {"engine": {"tensor_parallel": 2}}
    assert of(tmp_path, 8, engines=4) == [(0,), (1,), (2,), (3,)]
    assert of(tmp_path, 8, {"generator": [4, 5, 6, 7, 3]}, engines=2, **pairs) == [(4, 5), (6, 7)]
    assert of(tmp_path, 8, engines=[[6, 1], [0, 3]], **pairs) == [(6, 1), (0, 3)]
    assert of(tmp_path, 8) == of(tmp_path, 0) == [None]
    assert of(tmp_path, 8, {"generator": [0, 1]}, **pairs) == [(0, 1)]
    assert of(tmp_path, 0, engines=1) == [None]


@pytest.mark.parametrize(
    ("gpus", "placement", "generate", "what"),
    [
        (
            3,
            {},
            {"engines": 2, "engine": {"tensor_parallel": 2}},
            "2 engines of 2 GPUs each need 4 GPUs, the generator has 3",
        ),
        (8, {"generator": [0]}, {"engines": 2}, "need 2 GPUs, the generator has 1"),
        (2, {}, {"engines": [[0], [5]]}, "names GPU 5; there are 2"),
        (
            8,
            {"generator": [0, 1]},
            {"engines": [[0], [2]]},
            "names GPU 2, which is not among those of placement.generator",
        ),
        (0, {}, {"engines": len(os.sched_getaffinity(0)) + 1}, "this process may use"),
    ],
)
def test_what_the_machine_does_not_have_is_named(tmp_path, gpus, placement, generate, what):
    with pytest.raises(ConfigError, match=what) as caught:
        of(tmp_path, gpus, placement, **generate)
    assert caught.value.exit_code == 2 and caught.value.hint


@pytest.mark.parametrize(
    ("generate", "what"),
    [
        ({"engines": [[0], [0]]}, "engines names GPU 0 twice"),
        ({"engines": [[0, 1], [2]], "engine": {"tensor_parallel": 2}}, "a group of 1 GPUs"),
        ({"engines": 2, "min_engines": 3}, "min_engines = 3 is more than the 2 engines"),
        ({"engines": []}, "empty list"),
        ({"engines": 0}, "greater than or equal to 1"),
        ({"engines": [[-1]]}, "numbers begin at 0"),
    ],
)
def test_groups_that_cannot_be_are_refused_when_the_configuration_is_read(generate, what):
    with pytest.raises(ValueError, match=what):
        GenerateConfig.model_validate(generate)
