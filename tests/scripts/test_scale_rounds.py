"""The bench of a whole round at scale, small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scale" / "rounds.py"
STAGES = ["prompts", "generate", "score", "guard", "pairs", "depth", "train", "evaluate", "promote"]


@pytest.mark.slow
def test_a_small_round_is_measured_stage_by_stage():
    argv = [sys.executable, str(SCRIPT), "--prompts", "64"]
    found = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout)
    assert found["pairs"] > 32
    assert list(found["stages"]) == STAGES
    assert all(peak > 0 and cpu >= 0 for peak, cpu in found["stages"].values())
