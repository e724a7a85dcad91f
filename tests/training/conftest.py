from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, another one, and pairs with the log-probabilities of the policy (trainer_world)."""
    from trainer_world import checkpoint, write_pairs

    root = tmp_path_factory.mktemp("world")
    checkpoint(root / "policy")
    checkpoint(root / "other", seed=5)
    write_pairs(root / "pairs.parquet", root / "policy")
    return root
