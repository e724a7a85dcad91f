"""A short form of `scripts/damage.py`: one damage to each kind of file that decides, in a run of two rounds, and in one whose
third round was killed in mid-training."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from mini import CALM, Command, nothing_left, sets

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


@pytest.mark.slow
def test_no_damage_in_mid_round_is_silent(script, calm, mini_world, tmp_path):
    from damages.damage import damages

    killed = shutil.copytree(calm[0], tmp_path / "killed", symlinks=True)
    run = Command(mini_world, killed, "--rounds", "3", *sets(*CALM))
    run.until(lambda: list(killed.glob("rounds/0003/train.work/checkpoint-2/epsilon_dpo.json")), "a second save")
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    run_out = time.monotonic() + 60
    while not nothing_left(killed):
        assert time.monotonic() < run_out
        time.sleep(0.05)
    folder = script.without_leftovers(killed, tmp_path / "whole")
    whole = script.whole_of(folder, tmp_path / "copy")
    verdicts: dict[str, set[str]] = {}
    for each in damages(folder, per_kind=2, seed=1):
        if each.file.startswith("rounds/0003/"):
            verdict, said = script.trial(folder, tmp_path / "copy", each, whole)
            assert verdict not in script.BAD, (each, verdict, said)
            verdicts.setdefault(each.kind.removeprefix("rounds/N/"), set()).add(verdict)
    assert {"stopped"} in verdicts.values(), verdicts
    again = {name for name, seen in verdicts.items() if "repaired" in seen}
    assert again >= {"generate-N.shards/N.parquet", "score-N.shards/N.parquet"}
    assert any(name.startswith("train.work/checkpoint-N/") for name in again)
