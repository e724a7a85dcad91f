"""A short form of `scripts/damage.py`: one damage to each kind of file that decides, in a run of two rounds."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
KINDS = {
    "closed.json", "depth/pairs.parquet", "evaluate/judge.json", "pairs/pairs.parquet", "prompts/drawn.parquet",
    "score/manifest.json", "score/reward.json", "score/scored.parquet",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import damage

    yield damage
    for name in [name for name in sys.modules if name.partition(".")[0] in ("damage", "damages", "chaos")]:
        del sys.modules[name]


@pytest.mark.slow
def test_no_damage_is_silent(script, calm, tmp_path):
    from damages.damage import damages

    folder = script.without_leftovers(calm[0], tmp_path / "whole")
    whole = script.whole_of(folder, tmp_path / "copy")
    verdicts = {}
    for each in damages(folder, per_kind=1, seed=1):
        of_a_round = each.kind.removeprefix("rounds/N/")
        if of_a_round == each.kind or of_a_round in KINDS:
            verdicts[each.kind, each.how] = script.trial(folder, tmp_path / "copy", each, whole)[0]
    assert not {what: verdict for what, verdict in verdicts.items() if verdict in script.BAD}
    seen = set(verdicts.values())
    assert seen == {"stopped", "repaired", "doctor", "no effect"}, verdicts
    of_current = {how: verdict for (kind, how), verdict in verdicts.items() if kind == "current"}
    assert [of_current[how] for how in ("lost", "names nothing", "is a folder")] == ["repaired"] * 3
