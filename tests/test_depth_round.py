"""A whole round on the miniature whose depth follows gradients: refused at first, then with all on one device."""

import os
from collections import Counter

import pyarrow.parquet as pq
import pytest
from mini import Command, nothing_left

from selfplay import artifacts
from selfplay.store import Store
from selfplay.types import Pair, PairGradient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("depth.method=gradient", "depth.pairs_per_prompt=1.5", "depth.dim=64", "depth.layers=2", "pairs.keep=0.7")


def settings(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


def test_depth_follows_the_gradients(mini_world, tmp_path):
    run_dir = tmp_path / "run"
    code, out = Command(mini_world, run_dir, "--rounds", "1", *settings("depth.layers=9")).finish()
    assert code == 3, out
    assert "round 1: stage depth failed: layers must lie in [1, " in out
    assert "what to do: set depth.layers" in out
    assert "trainer.log" in out
    assert not (run_dir / "rounds" / "0001" / "depth").exists()

    # The same folder goes on; on one device the engine sleeps from the features to the end of training.
    code, out = Command(mini_world, run_dir, "--rounds", "1", *settings("placement.colocated=true")).finish()
    assert code == 0, out
    assert "pairs «kept»" in out
    assert nothing_left(run_dir)
    folder = run_dir / "rounds" / "0001"
    base = [p for p in artifacts.read_rows(folder / "pairs" / "pairs.parquet", Pair) if p.kept_because]
    gradients = artifacts.read_rows(folder / "depth" / "gradients.parquet", PairGradient)
    assert [g.prompt_id for g in gradients] == [p.prompt_id for p in base]
    assert len(base) > 10 and len({g.cluster for g in gradients}) > 1
    assert pq.read_schema(folder / "depth" / "gradients.parquet").field("feature").type.list_size == 64
    pairs = artifacts.read_rows(folder / "depth" / "pairs.parquet", Pair)
    by_prompt = {g.prompt_id: (g.cluster, g.closeness) for g in gradients}
    assert all((p.cluster, p.closeness) == by_prompt[p.prompt_id] for p in pairs)
    assert [p.prompt_id for p in pairs if p.kept_because == "base"] == [p.prompt_id for p in base]
    depths = Counter(p.prompt_id for p in pairs)
    assert len(base) < len(pairs) <= round(1.5 * len(base)) and max(depths.values()) > 1
    store = Store(run_dir)
    metrics = store.metrics(1)
    assert metrics["depth/pairs"] == len(pairs) and metrics["depth/most"] == max(depths.values())
    assert metrics["depth/zero_gradients"] == metrics["depth/nonfinite_gradients"] == 0
    assert metrics["depth/clusters"] == len({g.cluster for g in gradients})
    assert -1 <= metrics["depth/closeness_length_correlation"] <= 1
    assert metrics["train/steps"] > 0
    assert store.rounds()[0]["state"] == "promoted"
    store.close()
    assert os.readlink(run_dir / "current") == "policies/0001"
