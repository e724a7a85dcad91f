"""A whole run on two nodes, with two engines, a reward and a trainer of two processes: nodes are killed in it, and the head."""

import subprocess
import sys
from pathlib import Path

import pytest
from mini import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]


def test_a_node_killed_in_each_stage_changes_nothing(tmp_path):
    said = chaos(tmp_path, "--in-stages", "--rounds", "1")
    assert "storm: 5 kills of a node" in said


def test_after_the_death_of_the_head_the_same_command_goes_on_in_the_middle_of_the_round(tmp_path):
    said = chaos(tmp_path, "--head", "--rounds", "2")
    assert "it goes on with round 1, which had depth, generate, guard, pairs, prompts, score" in said


def chaos(out: Path, *how: str) -> str:
    """What the storm said, which ended without a fault."""
    argv = [sys.executable, str(ROOT / "scripts" / "chaos_cluster.py"), *how, "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults, 0 orphans" in done.stdout
    assert "0 lost rows, 0 double rows" in done.stdout
    return done.stdout
