"""A whole round on two nodes, with two engines, a reward and a trainer of two processes, of which one is killed in each stage."""

import subprocess
import sys

import pytest
from mini import ROOT


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_node_killed_in_each_stage_changes_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos_cluster.py"), "--in-stages", "--rounds", "1", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "storm: 5 kills of a node" in done.stdout
    assert "0 faults, 0 orphans" in done.stdout
    assert "0 lost rows, 0 double rows" in done.stdout
