"""The numbers of a round's candidates, and their rewards."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfplay.errors import CheckpointError
from selfplay.storage import answers, tables
from selfplay.storage.candidates import first_of_equals, read_candidates, read_external, read_rewards
from selfplay.types import Candidate, Reward, Scored


def candidate(name, index, ids, finish="stop", logp=-1.0):
    return Candidate(
        prompt_id=name, index=index, text=f"{name}/{index}", token_ids=ids, logp=logp, n_tokens=len(ids),
        finish_reason=finish, policy=2, digest=answers.digest(np.array(ids, np.int32)),
    )  # fmt: skip


ROWS = [
    candidate("b", 0, [5, 2], logp=-1.5),
    candidate("b", 1, [7], "length"),
    candidate("a", 0, [5, 2]),
    candidate("a", 1, [5, 2], logp=-2.5),
    candidate("a", 2, []),
]


@pytest.fixture
def path(tmp_path):
    tables.write_rows(tmp_path / "candidates.parquet", ROWS, Candidate)
    return tmp_path / "candidates.parquet"


def test_the_numbers_of_all_candidates_lie_in_columns_prompt_by_prompt(path):
    found = read_candidates(path)
    assert (found.prompt_ids, found.starts.tolist(), found.prompt.tolist()) == (["b", "a"], [0, 2, 5], [0, 0, 1, 1, 1])
    assert (found.index.tolist(), found.n_tokens.tolist()) == ([0, 1, 0, 1, 2], [2, 1, 2, 2, 0])
    assert (found.logp.tolist(), found.whole.tolist()) == ([-1.5, -1, -1, -2.5, -1], [True, False, True, True, True])
    assert found.digest.tolist() == [row.digest for row in ROWS] and found.digest.dtype == np.int64


def test_a_file_from_before_the_digests_has_the_same_numbers(path, tmp_path):
    """It has no digests, and token ids of 64 bits; the digests of today are computed from these."""
    table = pq.read_table(path).drop_columns(["digest"])
    place = table.column_names.index("token_ids")
    wide = table.schema.set(place, pa.field("token_ids", pa.list_(pa.int64())))
    pq.write_table(table.cast(wide), tmp_path / "old.parquet", row_group_size=2)
    old, new = read_candidates(tmp_path / "old.parquet"), read_candidates(path)
    assert old.prompt_ids == new.prompt_ids
    for name in ("starts", "index", "logp", "n_tokens", "whole", "digest"):
        assert np.array_equal(getattr(old, name), getattr(new, name)), name


def test_a_round_without_candidates_is_empty(tmp_path):
    tables.write_rows(tmp_path / "none.parquet", [], Candidate)
    tables.write_rows(tmp_path / "rewards.parquet", [], Reward)
    found = read_candidates(tmp_path / "none.parquet")
    assert (found.prompt_ids, found.starts.tolist(), len(found.index)) == ([], [0], 0)
    assert len(read_rewards(tmp_path / "rewards.parquet", found).reward) == 0
    assert len(first_of_equals(found, np.zeros(0, np.bool_))) == 0


def test_candidates_of_a_prompt_that_do_not_follow_each_other_are_refused(tmp_path):
    tables.write_rows(tmp_path / "mixed.parquet", [ROWS[0], ROWS[2], ROWS[1]], Candidate)
    with pytest.raises(CheckpointError, match=r"mixed\.parquet: the candidates of a prompt do not follow each other"):
        read_candidates(tmp_path / "mixed.parquet")


def test_equal_answers_count_once_within_a_prompt(path):
    """The same ids at another prompt are another answer; what is left out beforehand hides no other."""
    found = read_candidates(path)
    assert first_of_equals(found, np.ones(5, np.bool_)).tolist() == [True, True, True, False, True]
    among = np.array([True, False, False, True, True])
    assert first_of_equals(found, among).tolist() == [True, False, False, True, True]


def reward(row, value, **parts):
    return Reward(prompt_id=row.prompt_id, index=row.index, reward=value, reward_parts=parts)


def test_rewards_and_their_parts_lie_in_columns_with_nan_for_what_is_missing(path, tmp_path):
    given = [
        reward(ROWS[0], 1.5, external=3.0, disagreement=0.5),
        reward(ROWS[1], None),
        reward(ROWS[2], -2.0, disagreement=0.25),
        reward(ROWS[3], 0.0, external=0.5),
        reward(ROWS[4], 4.0),
    ]
    tables.write_rows(tmp_path / "scored.parquet", given, Reward)
    found = read_rewards(tmp_path / "scored.parquet", read_candidates(path))
    nan = math.nan
    assert np.array_equal(found.reward, [1.5, nan, -2.0, 0.0, 4.0], equal_nan=True)
    assert found.parts.keys() == {"external", "disagreement"}
    assert np.array_equal(found.parts["disagreement"], [0.5, nan, 0.25, nan, nan], equal_nan=True)
    # before shaping, where there was any
    assert np.array_equal(found.external, [3.0, nan, -2.0, 0.5, 4.0], equal_nan=True)
    assert np.array_equal(read_external(tmp_path / "scored.parquet"), found.external, equal_nan=True)


def test_rewards_that_are_all_missing_are_numbers_still(path, tmp_path):
    tables.write_rows(tmp_path / "scored.parquet", [reward(row, None) for row in ROWS], Reward)
    found = read_rewards(tmp_path / "scored.parquet", read_candidates(path))
    assert np.isnan(found.reward).all() and found.reward.dtype == np.float64 and found.parts == {}
    assert np.isnan(found.external).all()


def test_scored_candidates_of_older_rounds_which_have_their_texts_again_are_read_as_rewards(path, tmp_path):
    fields = ("prompt_id", "index", "text", "token_ids", "logp", "n_tokens", "finish_reason", "policy")
    rows = [Scored(**{f: getattr(r, f) for f in fields}, reward=1.0, reward_parts={"external": 2.0}) for r in ROWS]
    tables.write_rows(tmp_path / "scored.parquet", rows, Scored)
    found = read_rewards(tmp_path / "scored.parquet", read_candidates(path))
    assert found.reward.tolist() == [1.0] * 5 and found.external.tolist() == [2.0] * 5


@pytest.mark.parametrize(
    "rows",
    [ROWS[:-1], [*ROWS[2:], *ROWS[:2]], [*ROWS[:4], candidate("a", 3, [])], [*ROWS[:4], candidate("c", 2, [])]],
    ids=["fewer", "in another order", "another index", "another prompt"],
)
def test_rewards_of_other_candidates_are_refused(path, tmp_path, rows):
    tables.write_rows(tmp_path / "scored.parquet", [reward(row, 1.0) for row in rows], Reward)
    with pytest.raises(CheckpointError, match="has the rewards of other candidates") as error:
        read_rewards(tmp_path / "scored.parquet", read_candidates(path))
    assert error.value.hint
