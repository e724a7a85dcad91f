"""A node reads the files that it is told of itself, and the controller tells it of those that it has hashed."""

from pathlib import Path

import pytest
from mini import TINY

from selfplay.config import load
from selfplay.errors import CheckpointError
from selfplay.generation.installing import WarmEngine
from selfplay.generation.orders import describe
from selfplay.processes.places import Local
from selfplay.storage import seen


class Elsewhere:
    """Another place than this machine. Nothing is started there."""

    def start(self, *how: object) -> Local:
        raise AssertionError


def test_a_node_that_sees_other_bytes_or_no_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs, weights = Path("pairs.parquet"), tmp_path / "model.safetensors"
    pairs.write_bytes(b"pairs")
    weights.write_bytes(b"weights")
    order = {"order": "train", seen.FILES: seen.told([pairs, weights, weights])}
    assert list(order[seen.FILES]) == [str(tmp_path / pairs), str(weights)]  # a child may work in another folder
    seen.require(order)
    seen.require({"order": "train"})  # beside the controller, which has checked them
    weights.write_bytes(b"Weights")
    with pytest.raises(
        CheckpointError, match=r"seen from .*: .*model\.safetensors is not what its manifest says"
    ) as error:
        seen.require(order)
    assert describe(error.value, "load").kind == "internal", "a new engine, perhaps on another node, is tried"
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        seen.require(order)


def test_an_engine_elsewhere_alone_is_told(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(b"prompts")
    config, log = load(TINY), tmp_path / "log"
    assert WarmEngine(config, tmp_path, log).files([tmp_path / "prompts"]) == {}
    there = WarmEngine(config, tmp_path, log, place=Elsewhere())
    assert there.files([tmp_path / "prompts"]) == {seen.FILES: seen.told([tmp_path / "prompts"])}
