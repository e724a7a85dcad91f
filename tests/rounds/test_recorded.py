"""A run folder that an older version left in mid-round goes on.

`tests/recorded/flat-modules.tar.xz` was recorded at commit df90fa7: one round of a miniature, and a second one that was
killed the moment its stage `score` was done. Its candidates have 64-bit ids and no digests, its rewards repeat the
candidates, and its ledger knows nothing of draws. The folder brings its own policy and prompts; the reward is a rule.
"""

import io
import json
import tarfile
from pathlib import Path

import pytest
from mini import ROOT, TINY, nothing_left
from rich.console import Console

from selfplay.config import load
from selfplay.reporting.terminal import Display
from selfplay.rounds.round import run_round
from selfplay.rounds.run import Run
from selfplay.storage import tables
from selfplay.types import Candidate, Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (
    "policy.model=world/policy",
    "reward.model=null",
    "reward.rules=[{rule: length, min: 30, max: 100, weight: 1.0}]",
    "prompts.source=world/train.jsonl",
    "prompts.heldout=world/heldout.jsonl",
    "prompts.per_round=16",
    "generate.candidates=4",
    "generate.shard_prompts=8",
    "pairs.keep=1.0",
    "train.batch_pairs=8",
    "train.micro_batch_pairs=8",
    "evaluate.judge=null",
    "evaluate.prompts=8",
    "evaluate.audit_prompts=8",
    "evaluate.gate.win_rate_lower=0.0",
    "evaluate.gate.reward_up=false",
    "evaluate.gate.max_length_ratio=9",
    "evaluate.gate.max_cut_off=1.0",
    "evaluate.gold=null",
    "depth.method=uniform",
    "track=none",
)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it would be where it was recorded."""
    with tarfile.open(ROOT / "tests" / "recorded" / "flat-modules.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for path in (tmp_path / "run" / "pool" / "initial.json", tmp_path / "run" / "policies" / "0000" / "manifest.json"):
        path.write_text(path.read_text().replace("@HERE@", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_a_run_of_before_goes_on_where_it_was_killed(recorded: Path) -> None:
    before = {
        path: path.read_bytes()
        for path in (recorded / "rounds").glob("*/*/*.parquet")
        if not path.parent.name.endswith(".shards")
    }
    said = io.StringIO()
    with Run(load(TINY, SETTINGS), recorded, Display(Console(file=said, width=200))) as run:
        second = run_round(run)
        third = run_round(run)
        drawn = [
            tables.read_column(recorded / "rounds" / f"{i:04d}" / "prompts" / "prompts.parquet", "prompt_id")
            for i in (1, 2, 3)
        ]
    out = said.getvalue()
    assert "round 2 is unfinished: going on with it" in out
    assert (second.round, third.round) == (2, 3)
    assert {second.outcome, third.outcome} <= {"promoted", "rejected"}
    assert second.metrics["pairs/base"] > 4 and second.metrics["depth/added"] > 0
    # What was finished is as it was, and the pairs are made from it.
    assert {path: path.read_bytes() for path in before} == before
    candidates = {
        (c.prompt_id, c.index): c
        for c in tables.read_rows(recorded / "rounds" / "0002" / "generate" / "candidates.parquet", Candidate)
    }
    pairs = tables.read_rows(recorded / "rounds" / "0002" / "depth" / "pairs.parquet", Pair)
    for pair in pairs:
        chosen, rejected = (
            candidates[pair.prompt_id, pair.chosen_index],
            candidates[pair.prompt_id, pair.rejected_index],
        )
        assert (pair.chosen_ids, pair.rejected_ids) == (chosen.token_ids, rejected.token_ids)
        assert (pair.chosen, pair.rejected) == (chosen.text, rejected.text)
    # No prompt is drawn a second time in the first epoch of the pool.
    assert len({i for ids in drawn for i in ids}) == sum(map(len, drawn)) == 48
    verdict = json.loads((recorded / "rounds" / "0003" / "evaluate" / "verdict.json").read_text())
    assert verdict["promoted"] == (third.outcome == "promoted")
    assert nothing_left(recorded)
