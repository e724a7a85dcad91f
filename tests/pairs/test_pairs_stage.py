"""The whole stage `pairs`, from small files of prompts, candidates and rewards to the file of pairs."""

import math

import pytest
from pairs_world import Files, Told
from pydantic import ValidationError

from selfplay.config import PairsConfig
from selfplay.errors import CheckpointError
from selfplay.pairs.stage import PAIRS, REFERENCE, pairs
from selfplay.storage import tables
from selfplay.types import Pair, ReferenceLogp, Reward

REWARDS = {
    "a": [1.0, 5.0, 2.0, None],  # response 1 against 0: margin 4
    "b": [3.0, 3.0, 3.0, 3.0],  # tied
    "c": [0.0, 0.5, -1.5, 9.0],  # its best one was cut off: 1 against 2, margin 2
    "d": [None, None, 1.0, None],  # one reward is no pair
    "e": [1.0, 1.0, 1.0, 1.001],  # within the noise
    "f": [7.0, 6.0, 4.0, 5.0],  # 0 against 2: margin 3
}


def run(files, out, score_by_reference=None, recent=(), noise=0.01, **settings):
    out.mkdir()
    line = Told()
    found = pairs(
        out, line, prompts=files.prompts, candidates=files.candidates, scored=files.scored, recent=recent,
        score_by_reference=score_by_reference or (lambda path: pytest.fail("the reference was asked")),
        settings=PairsConfig(**settings), noise=noise, beta=0.1, seed=5,
    )  # fmt: skip
    assert all((out / name).is_file() for name in PAIRS.writes)
    return tables.read_rows(out / "pairs.parquet", Pair), found, line.text


@pytest.fixture
def files(tmp_path):
    made = Files(tmp_path / "round", REWARDS)
    made.write_candidates(cut=[("c", 3)])
    return made


def test_every_prompt_that_can_gives_one_whole_pair_with_the_texts_of_its_candidates(files, tmp_path):
    found, metrics, said = run(files, tmp_path / "out", keep=0.67, selection="explicit")
    assert [(p.prompt_id, p.chosen_index, p.rejected_index, p.explicit_margin) for p in found] == [
        ("a", 1, 0, 4.0), ("c", 1, 2, 2.0), ("e", 3, 0, pytest.approx(0.001)), ("f", 0, 2, 3.0)
    ]  # fmt: skip
    assert files.told(found)
    assert [(p.kept_because, p.dropped_because) for p in found] == [
        ("base", None), (None, "explicit"), (None, "noise"), ("base", None)
    ]  # fmt: skip
    assert (metrics["base"], metrics["kept"], metrics["explicit_margin"]) == (4, 2, 3.5)
    assert {n: metrics[n] for n in metrics if n.startswith("prompts")} == {
        "prompts_cut_off": 0, "prompts_unscored": 1, "prompts_equal": 0, "prompts_tied": 1
    }  # fmt: skip
    assert said == "2 of 4 pairs kept"
    # of a: chosen has logp −4 and 3 tokens, rejected −3 and 2: r̂ are −4/3 and −3/2
    assert (found[0].chosen_logp, found[0].rejected_logp) == (-4.0, -3.0)
    assert found[0].implicit_signed == pytest.approx(-4 / 3 + 3 / 2)


def test_files_from_before_the_digests_give_the_same_pairs(files, tmp_path):
    """Equal answers are found by their ids then, and ids of 64 bits become those of today."""
    files.ids["f", 2] = files.ids[
        "f", 1
    ]  # the same answer twice: the first of the two counts, so 5 is the lowest reward
    files.write_candidates(cut=[("c", 3)])
    new, metrics, _ = run(files, tmp_path / "new")
    files.grow_old()
    old, old_metrics, _ = run(files, tmp_path / "old")
    assert (old, old_metrics) == (new, metrics)
    assert [(p.chosen_index, p.rejected_index) for p in new] == [(1, 0), (1, 2), (3, 0), (0, 3)]
    assert (tmp_path / "old" / "pairs.parquet").read_bytes() == (tmp_path / "new" / "pairs.parquet").read_bytes()


def test_responses_that_were_cut_off_can_be_rejected_ones(files, tmp_path):
    found, _, _ = run(files, tmp_path / "out", cut_off="reject")
    assert ("c", 1, 2) in [(p.prompt_id, p.chosen_index, p.rejected_index) for p in found]
    files.write_candidates(cut=[("c", 2), ("c", 3)])
    found, _, _ = run(files, tmp_path / "more", cut_off="reject")
    assert ("c", 1, 2) in [(p.prompt_id, p.chosen_index, p.rejected_index) for p in found]
    found, _, _ = run(files, tmp_path / "drop")
    assert ("c", 1, 0) in [(p.prompt_id, p.chosen_index, p.rejected_index) for p in found]


def test_where_implicit_rewards_need_the_reference_it_is_asked_and_its_words_are_kept(files, tmp_path):
    """β = .1 and a reference that gives every candidate −2: r̂ = .1·(logp + 2), for a −.2 against −.1."""

    def score_by_reference(path):
        rows = [ReferenceLogp(prompt_id=p, index=k, logp=-2.0) for p, k in files.ids]
        tables.write_rows(path, rows, ReferenceLogp)

    found, _, _ = run(files, tmp_path / "out", score_by_reference, implicit="dpo")
    assert found[0].implicit_signed == pytest.approx(-0.1)
    assert tables.count_rows(tmp_path / "out" / REFERENCE) == len(files.ids)
    with pytest.raises(CheckpointError, match="has 0 rows for 24 candidates"):
        run(files, tmp_path / "less", lambda path: tables.write_rows(path, [], ReferenceLogp), implicit="dpo")


def test_the_statistics_of_a_small_set_take_the_pairs_of_earlier_rounds_in(files, tmp_path):
    """Base margins that rank here: 4, 2, 3. An earlier round had 1, 1, 1 and one within the noise, which does not count."""
    earlier = Files(tmp_path / "earlier", {"x": [0.0, 1.0], "y": [0.0, 1.0], "z": [0.0, 1.0], "n": [0.0, 0.001]})
    run(earlier, tmp_path / "before")
    recent = [tmp_path / "before" / "pairs.parquet"]
    found, _, _ = run(files, tmp_path / "out", recent=recent, weight=0.0)
    margins = [4.0, 2.0, 3.0, 1.0, 1.0, 1.0]
    mean = sum(margins) / 6
    deviation = math.sqrt(sum((m - mean) ** 2 for m in margins) / 6)
    potentials = [p.potential for p in found if p.dropped_because != "noise"]
    assert potentials == pytest.approx([(m - mean) / deviation for m in margins[:3]])


def test_an_ensembles_disagreement_is_read_from_the_parts_of_the_rewards(files, tmp_path):
    rows = tables.read_rows(files.scored, Reward)
    parts = {("a", 1): {"disagreement": 0.9}, ("f", 0): {"disagreement": 0.1, "member_x": 2.0}}
    given = [
        Reward(
            prompt_id=r.prompt_id, index=r.index, reward=r.reward, reward_parts=parts.get((r.prompt_id, r.index), {})
        )
        for r in rows
    ]
    tables.write_rows(files.scored, given, Reward)
    found, metrics, _ = run(files, tmp_path / "out", max_disagreement=0.5)
    assert [p.prompt_id for p in found if p.dropped_because == "disagreement"] == ["a"]
    assert metrics["dropped_disagreement"] == 1


def test_rewards_of_other_candidates_are_refused(files, tmp_path):
    rows = tables.read_rows(files.scored, Reward)
    for name, other in (("fewer", rows[:-1]), ("shuffled", [*rows[4:], *rows[:4]]), ("turned", rows[::-1])):
        tables.write_rows(files.scored, other, Reward)
        with pytest.raises(CheckpointError, match="the rewards of other candidates") as error:
            run(files, tmp_path / name)
        assert "delete the stage" in error.value.hint


def test_the_same_seed_gives_the_same_bytes(files, tmp_path):
    for name in ("one", "two"):
        run(files, tmp_path / name, selection="random", keep=0.5)
    assert (tmp_path / "one" / "pairs.parquet").read_bytes() == (tmp_path / "two" / "pairs.parquet").read_bytes()


def test_pairs_of_the_easier_prompts_alone(files, tmp_path):
    """Mean rewards: a 8/3, b 3, c 2, d 1, e 1.00025, f 5.5. Half of the six prompts: f, b and a; b is tied."""
    found, metrics, _ = run(files, tmp_path / "out", easiest=0.5, keep=1.0, selection="explicit")
    assert [(p.prompt_id, p.dropped_because) for p in found] == [
        ("a", None), ("c", "difficult"), ("e", "noise"), ("f", None)
    ]  # fmt: skip
    assert (metrics["base"], metrics["kept"], metrics["dropped_difficult"]) == (4, 2, 1)


def test_pairs_ranked_by_both_margins_fused(files, tmp_path):
    with pytest.raises(ValidationError, match="fused goes with signed: true"):
        PairsConfig(selection="fused")
    found, metrics, _ = run(files, tmp_path / "out", selection="fused", signed=True, keep=0.34)
    # f: margin 3, and r̂ −3/2 + 5/4 … all are within rounding of each other but c, whose chosen one is the likelier by most
    assert [p.dropped_because for p in found if p.dropped_because] == ["fused", "noise", "fused"]
    assert metrics["kept"] == 1
