"""The guard's look at answers, before anything is trained on them."""

import time

import numpy as np
import pyarrow as pa
import pytest

from selfplay.rewards.early_signs import NAMES, advice, early_signs
from selfplay.rewards.guard import measure
from selfplay.storage import tables
from selfplay.storage.candidates import read_candidates, read_rewards
from selfplay.types import Candidate, Reward


def write(folder, prompts, each, length, whole, reward):
    """A round of answers as columns: `length`, `whole` and `reward` (N,); the ids are random, of 1,000 words."""
    n, rng = prompts * each, np.random.default_rng(5)
    starts = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    ids = pa.ListArray.from_arrays(pa.array(starts), pa.array(rng.integers(0, 1000, starts[-1]), pa.int32()))
    keys = {
        "prompt_id": pa.array(np.repeat([f"p{i}" for i in range(prompts)], each)),
        "index": pa.array(np.tile(np.arange(each), prompts)),
    }
    candidates = pa.table(
        keys
        | {
            "text": pa.array(["x"] * n), "token_ids": ids, "logp": pa.array(np.full(n, -9.0)), "n_tokens": pa.array(length),
            "finish_reason": pa.array(np.where(whole, "stop", "length")), "policy": pa.array(np.zeros(n, np.int64)),
            "digest": pa.array(np.arange(n)), "thinking": pa.nulls(n, pa.int64()),
        }
    )  # fmt: skip
    scored = pa.table(keys | {"reward": pa.array(reward), "reward_parts": pa.array(["{}"] * n)})
    for name, table, kind in (("candidates", candidates, Candidate), ("scored", scored, Reward)):
        with tables.writing(folder / f"{name}.parquet", kind) as file:
            file.table(table)
    return folder / "candidates.parquet", folder / "scored.parquet"


def cut_off_round(folder, prompts=128, each=8):
    """58 % of the answers hit the limit of 80 tokens; the others are short. A rubric that wants an end gives those more."""
    rng = np.random.default_rng(3)
    n = prompts * each
    whole = rng.random(n) >= 0.58
    length = np.where(whole, rng.integers(5, 40, n), 80)
    return write(folder, prompts, each, length, whole, rng.random(n) + whole)


def signs(candidates, scored, cut_off):
    columns = read_candidates(candidates)
    return early_signs(candidates, columns, read_rewards(scored, columns), cut_off)


def test_a_round_whose_answers_are_cut_off_and_rejected_shows_it_in_three_signs(tmp_path):
    files = cut_off_round(tmp_path)
    found = signs(*files, "reject")
    assert set(found) == set(NAMES)
    assert found["cut_off"] == pytest.approx(0.58, abs=0.04)
    assert found["length_gap"] < -0.6 and found["decided_by_length"] < -0.97  # the short ones win
    assert found["duplicates"] == 0.0 and found["repetition"] < 0.01
    dropped = signs(*files, "drop")  # those that are left differ by chance alone
    assert abs(dropped["length_gap"]) < 0.2 and abs(dropped["decided_by_length"]) < 0.7
    assert dropped["cut_off"] == found["cut_off"]


def test_every_sign_says_which_setting_to_change():
    said = advice("cut_off", 0.58, "reject")
    assert "raise generate.max_tokens" in said and "set pairs.cut_off: drop" in said
    assert "set pairs.cut_off" not in advice("cut_off", 0.58, "drop")
    short = advice("decided_by_length", -0.98, "reject")
    assert "the shorter answer" in short and "length_control" in short and "pairs.cut_off: drop" in short
    assert "pairs.keep" in short and "the longer answer" in advice("decided_by_length", 0.98, "reject")
    assert all("reward.shaping.length_control" in advice(name, -0.9, "drop") for name in NAMES[1:3])
    assert "pairs.keep" in advice("duplicates", 0.6, "drop") and "repetition_penalty" in advice(
        "repetition", 0.6, "drop"
    )
    assert advice("ties", 0.9, "drop") == ""


def test_answers_that_repeat_themselves_or_each_other(tmp_path):
    rows = [
        Candidate(
            prompt_id=f"p{i // 4}", index=i % 4, text="x", token_ids=[5, 6, 7] * 7 if i % 2 else [8, 9], logp=-1.0,
            n_tokens=21 if i % 2 else 2, finish_reason="stop", policy=0,
        )
        for i in range(40)
    ]  # fmt: skip
    tables.write_rows(tmp_path / "c.parquet", rows, Candidate)
    given = [Reward(prompt_id=r.prompt_id, index=r.index, reward=float(r.index)) for r in rows]
    tables.write_rows(tmp_path / "s.parquet", given, Reward)
    found = signs(tmp_path / "c.parquet", tmp_path / "s.parquet", "drop")
    assert found["duplicates"] == 0.5
    assert found["repetition"] == pytest.approx((15 / 18 + 0) / 2)  # of 18 4-grams three are distinct


@pytest.mark.slow
def test_the_guard_of_8192_prompts_with_8_answers_each_takes_a_second_at_most(tmp_path):
    candidates, scored = cut_off_round(tmp_path, prompts=8192)
    columns = read_candidates(candidates)
    rewards = read_rewards(scored, columns)
    began = time.process_time()
    found = early_signs(candidates, columns, rewards, "reject")
    assert time.process_time() - began < 1.0
    assert found["cut_off"] == pytest.approx(0.58, abs=0.01)
    assert set(found) <= set(measure(candidates, scored, [], [], 1e-4, "reject", 3))
