"""What the cards say of a run whose settings changed on the way."""

import dataclasses

import pyarrow.parquet as pq
import pytest
from mini import TINY
from served_world import build

from selfplay.config import RetentionConfig, load
from selfplay.errors import InputError
from selfplay.reporting import export
from selfplay.storage import retention, tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest
from selfplay.types import Prompt

NO_MODEL = "reward.model=null"
SOURCES = {
    "`org/reward`": ["reward.model=org/reward"],
    "a reward server": [NO_MODEL, "reward.url=[http://10.0.0.7:8100]"],
    "rules (length, json)": [NO_MODEL, "reward.rules=[{rule: length, max: 9}, {rule: json}]"],
    "the pointwise judge `big`": [NO_MODEL, "reward.chat_judge={url: ['http://10.0.0.7'], model: big}"],
    "an ensemble (minimum) of `a/b`, rules (json)": [
        NO_MODEL, "reward.ensemble={combine: minimum, members: [{model: a/b}, {rules: [{rule: json}]}]}",
    ],
}  # fmt: skip


@pytest.mark.parametrize("said", SOURCES)
def test_what_scored_is_named_and_its_address_is_not(said):
    config = load(TINY, ["evaluate.judge=null", *SOURCES[said]]).model_dump(mode="json")
    assert export._made_by(config) == f"ranked by {said}, selected by `potential` (keep 0.8), depth `none`"


def test_the_dataset_card_says_of_which_rounds_only_the_pairs_are_left(run_dir, tmp_path):
    whole = export.export_pairs(run_dir, tmp_path / "whole")
    assert "retention" not in (tmp_path / "whole" / "README.md").read_text()
    store = Store(run_dir)
    retention.apply(
        run_dir=run_dir, settings=RetentionConfig(candidates_rounds=2, pair_rows_rounds=1), store=store, closed=4,
        needed_policies={4}, needed_rounds=1,
    )  # fmt: skip
    store.close()
    assert export.export_pairs(run_dir, tmp_path / "pairs") == whole
    assert "Of the rounds up to 2 only their pairs are left" in (tmp_path / "pairs" / "README.md").read_text()


@pytest.fixture
def run_dir(tmp_path):
    """Four rounds; the selection of the third was another. Of its first prompt the ancestors are known."""
    store = build(tmp_path / "run", rounds=4, pairs=6)
    other = load(TINY, ["pairs.selection=explicit", "pairs.keep=0.5"])
    store.change_config(3, other.fingerprint(), other.model_dump(mode="json"))
    store.close()
    path = tmp_path / "run" / "rounds" / "0003" / "prompts" / "prompts.parquet"
    rewritten = [dataclasses.replace(p, parent="father", root="forefather") for p in tables.read_rows(path, Prompt)]
    tables.write_rows(path, rewritten, Prompt)
    return tmp_path / "run"


def test_the_dataset_card_has_the_settings_of_each_round(run_dir, tmp_path):
    count = export.export_pairs(run_dir, tmp_path / "pairs")
    card = (tmp_path / "pairs" / "README.md").read_text()
    assert f"{count} pairs from 4 rounds" in card
    assert "- rounds 1 to 2: ranked by" in card and "- round 4: ranked by" in card
    (third,) = [line for line in card.splitlines() if line.startswith("- round 3: ")]
    assert third.endswith("selected by `explicit` (keep 0.5), depth `none`")
    for index, lineage in ((1, {(None, True)}), (3, {("father", False)})):
        rows = pq.read_table(tmp_path / "pairs" / "data" / f"train-{index:05d}.parquet").to_pylist()
        assert {(row["parent"], row["root"] == row["prompt_id"]) for row in rows} == lineage
    assert {row["root"] for row in rows} == {"forefather"}


def test_the_model_card_has_the_settings_of_the_round_that_trained_it(run_dir):
    manifest = Manifest(
        version=3, parent=2, round=3, beta=0.1, reference=2, reference_sha256=None, fingerprint="f", packages={}, update={},
        files={}, canaries={},
    )  # fmt: skip
    assert "selected by `explicit` (keep 0.5)" in export._model_card(run_dir, manifest)
    initial = dataclasses.replace(manifest, version=0, round=0, parent=None, reference=None, beta=None)
    card = export._model_card(run_dir, initial)
    assert "The model that the run began with." in card and "| parent, reference | none, none |" in card
    assert "ranked by" not in card


def test_a_run_without_a_finished_round_has_no_pairs(tmp_path):
    build(tmp_path / "run", rounds=0).close()
    with pytest.raises(InputError, match="no finished round"):
        export.export_pairs(tmp_path / "run", tmp_path / "pairs")
