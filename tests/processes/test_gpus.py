"""Numbers of GPUs in the configuration, and what a child is told of them."""

import pytest

from selfplay.errors import ConfigError
from selfplay.processes import gpus

BUS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def visible(monkeypatch, names):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)


@pytest.mark.parametrize(
    ("names", "given", "told"),
    [
        (None, [0, 3], "0,3"),
        ("4,5,6,7", [0], "4"),  # never GPU 0, which is another job's
        ("4,5,6,7", [3, 1], "7,5"),
        ("GPU-aa, MIG-bb", [1], "MIG-bb"),
    ],
)
def test_numbers_count_the_gpus_that_the_controller_may_use(monkeypatch, names, given, told):
    visible(monkeypatch, names)
    assert gpus.environment(given) == {**BUS, "CUDA_VISIBLE_DEVICES": told}


def test_a_child_without_gpus_of_its_own_sees_what_the_controller_sees(monkeypatch):
    for names in (None, "4,5", ""):
        visible(monkeypatch, names)
        assert gpus.environment(None) == BUS


def test_the_gpu_of_another_job_cannot_be_named(monkeypatch):
    visible(monkeypatch, "4,5")
    with pytest.raises(ConfigError, match="placement names GPU 2, but CUDA_VISIBLE_DEVICES has 2: 4, 5"):
        gpus.environment([0, 2])
    visible(monkeypatch, "")
    with pytest.raises(ConfigError, match="has 0: none"):
        gpus.environment([0])


def test_what_follows_a_name_that_is_no_gpu_does_not_count(monkeypatch):
    visible(monkeypatch, "2,-1,3")
    assert (gpus.listed(), gpus.count()) == (["2"], 1)
