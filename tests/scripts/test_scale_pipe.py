import sys

import pytest
from mini import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from scale import pipe

pytestmark = pytest.mark.slow


def test_the_answer_of_a_real_child_is_measured() -> None:
    figures = pipe.measure(2)
    assert 1.9 < figures["megabytes"] < 2.1
    assert figures["cpu_seconds"] > 0 and figures["parse_cpu_seconds"] > 0
    assert 0 < figures["wall_seconds"] < 60
