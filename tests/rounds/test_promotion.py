"""What decides on a candidate: the gate, and the suites, each of which may veto."""

import json

import pytest

from selfplay.rounds.promotion import decided


@pytest.mark.parametrize(
    ("promoted", "vetoes", "expected"),
    [
        (True, None, (True, [])),
        (True, [], (True, [])),
        (True, ["suite arc: it fell"], (False, ["suite arc: it fell"])),
        (False, None, (False, ["it is worse"])),
        (False, ["suite arc: it fell"], (False, ["it is worse", "suite arc: it fell"])),
    ],
)
def test_a_candidate_needs_the_gate_and_no_veto(tmp_path, promoted, vetoes, expected):
    gate, suites = tmp_path / "gate.json", tmp_path / "suites.json"
    gate.write_text(json.dumps({"promoted": promoted, "reasons": [] if promoted else ["it is worse"]}))
    if vetoes is not None:
        suites.write_text(json.dumps({"vetoes": vetoes}))
    assert decided(gate, suites) == expected
