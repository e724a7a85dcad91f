"""Whole pairs on disk: numbers joined with texts and token ids."""

import numpy as np
from pairs_world import Files

from selfplay.pairs.responses import Responses
from selfplay.pairs.writing import read_ranked, write_pairs
from selfplay.storage import tables
from selfplay.types import Pair, RankedPair


def ranked(prompt_id, chosen, rejected, **fields):
    return RankedPair(
        prompt_id=prompt_id, chosen_index=chosen, rejected_index=rejected, chosen_reward=2.0, rejected_reward=0.5,
        chosen_logp=-1.0, rejected_logp=-2.0, explicit_margin=1.5, implicit_margin=0.5, implicit_signed=-0.5, **fields,
    )  # fmt: skip


def test_texts_and_ids_are_those_of_the_responses_that_a_pair_names(tmp_path):
    """In any order of the pairs, over several row groups of pairs and of candidates."""
    rng = np.random.default_rng(0)
    files = Files(tmp_path, {f"p{i}": [0.0] * 4 for i in range(150)})
    made = []
    for _ in range(2 * tables.GROUP_ROWS + 7):
        chosen, rejected = rng.choice(4, 2, replace=False).tolist()
        made.append(ranked(f"p{rng.integers(150)}", chosen, rejected, potential=float(rng.normal())))
    columns = Responses.read(files.candidates, files.scored).candidates
    write_pairs(tmp_path / "pairs.parquet", made, files.prompts, files.candidates, columns)
    whole = tables.read_rows(tmp_path / "pairs.parquet", Pair)
    assert len(whole) == len(made) and files.told(whole)
    assert read_ranked(tmp_path / "pairs.parquet") == made
    assert [(p.prompt_id, p.potential) for p in whole] == [(p.prompt_id, p.potential) for p in made]


def test_no_pairs_are_an_empty_file(tmp_path):
    files = Files(tmp_path, {"p": [0.0, 1.0]})
    columns = Responses.read(files.candidates, files.scored).candidates
    write_pairs(tmp_path / "pairs.parquet", [], files.prompts, files.candidates, columns)
    assert tables.read_rows(tmp_path / "pairs.parquet", Pair) == []
    assert read_ranked(tmp_path / "pairs.parquet") == []


def test_everything_that_was_decided_of_a_pair_comes_back(tmp_path):
    files = Files(tmp_path, {"p": [0.0, 1.0]})
    columns = Responses.read(files.candidates, files.scored).candidates
    made = [
        ranked("p", 1, 0, potential=0.25, cluster=3, closeness=0.75, kept_because="depth"),
        ranked("p", 0, 1, dropped_because="nonfinite"),
    ]
    write_pairs(tmp_path / "pairs.parquet", made, files.prompts, files.candidates, columns)
    assert read_ranked(tmp_path / "pairs.parquet") == made
