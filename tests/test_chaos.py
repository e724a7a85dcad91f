"""The short form of `scripts/chaos.py`: kills at random moments, and a run that ends as if nobody had disturbed it."""

import subprocess
import sys

import pytest
from mini import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_killed_at_random_moments_a_served_run_ends_the_same(mini_world, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--kills", "10", "--rounds", "2", "--share", "0.2", "--seed", "1", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults, 0 orphans" in done.stdout
    assert int(done.stdout.split("storm: ")[1].split()[0]) >= 10
