"""The engine without a model, under the real generator: a measurement with it has to be one of the real stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "scale" / "generation.py"


@pytest.mark.slow
def test_the_stage_is_measured_with_an_engine_that_takes_swaps():
    argv = [sys.executable, str(SCRIPT), "--prompts", "24", "--candidates", "4", "--shard-prompts", "16"]
    out = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    found = json.loads(out)
    assert (found["prompts"], found["candidates"]) == (24, 4)
    assert found["cpu"] > found["sample_cpu"] > 0 <= found["logps_cpu"]
    assert found["grown_mb"] < 100 and found["megabytes"] > 24 * 4 * 591 * 2 / 1e6  # ids of 17 bits, and text
