"""The stage `generate` over a generator that only pretends: shards that are kept, and stops between them."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from selfplay.config import GenerateConfig
from selfplay.errors import Interrupted
from selfplay.generation import sampling
from selfplay.generation.generator import Sampled
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Prompt

PROMPTS = [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=[1, i], split="train") for i in range(5)]


def candidate(prompt_id="p", index=0, ids=(7, 2), **fields):
    values = {"text": "a", "logp": -1.0, "finish_reason": "stop", "policy": 3, "digest": answers.digest(np.array(ids))}
    return Candidate(
        prompt_id=prompt_id, index=index, token_ids=list(ids), n_tokens=len(ids), **{**values, **fields}
    )  # fmt: skip


class Pretended:
    """Answers each prompt with its seed; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def sample(self, asks, *, on_progress, before_shard, on_shard=lambda shard, sampled: None):
        (asked,), done = asks, 0
        for shard in asked.shards:
            before_shard()
            rows = tables.read_slice(asked.prompts, Prompt, shard.start, len(shard.seeds))
            self.asked.append([row.prompt_id for row in rows])
            said = [
                candidate(row.prompt_id, k, (seed + k, 2), text=str(seed), finish_reason="stop" if k else "length")
                for row, seed in zip(rows, shard.seeds, strict=True)
                for k in range(asked.candidates)
            ]
            tables.write_rows(shard.file, said, Candidate)
            on_progress(done := done + len(rows))
            on_shard(shard, Sampled(rows=len(said), tokens=2 * len(said), seconds=1.0))


def seed(prompt_id):
    return int(prompt_id[1:]) * 100


def ask(generator, folder, before_shard=lambda: None):
    done = []
    request = sampling.Request(rows=PROMPTS, candidates=2, seed=seed, shards=folder)
    (rows,) = sampling.ask(
        lambda: generator, [request], shard_prompts=2, on_progress=done.append, before_shard=before_shard
    )  # fmt: skip
    return rows, done


def test_prompts_are_sampled_in_shards_and_in_order(tmp_path):
    generator = Pretended()
    rows, done = ask(generator, tmp_path / "shards")
    assert generator.asked == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [(r.prompt_id, r.index) for r in rows] == [(f"p{i}", k) for i in range(5) for k in range(2)]
    assert rows[7].token_ids == [301, 2] and rows[7].policy == 3
    assert sorted(done) == done and done[-1] == 5
    nothing = sampling.Request(rows=[], seed=seed, shards=tmp_path / "none")
    assert sampling.ask(lambda: generator, [nothing], shard_prompts=2) == [[]]


def test_a_stop_between_shards_loses_none_and_no_shard_is_sampled_twice(tmp_path):
    whole, _ = ask(Pretended(), tmp_path / "whole")
    left = [2]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted("the service stops")

    with pytest.raises(Interrupted):
        ask(Pretended(), tmp_path / "shards", stop)
    again = Pretended()
    rows, _ = ask(again, tmp_path / "shards")
    assert again.asked == [["p4"]]
    assert rows == whole


def test_each_whole_shard_is_told_those_of_an_earlier_try_first(tmp_path):
    prompts, folder = tmp_path / "prompts.parquet", tmp_path / "shards"
    tables.write_rows(prompts, PROMPTS, Prompt)

    def told():
        seen = []
        files = sampling.sample(
            Pretended(), prompts, candidates=2, seed=seed, shards=folder, shard_prompts=2,
            on_shard=lambda start, file: seen.append((start, tables.count_rows(file))),
        )  # fmt: skip
        return seen, files

    seen, files = told()
    assert seen == [(0, 4), (2, 4), (4, 2)]
    files[1].unlink()
    assert told() == ([(0, 4), (4, 2), (2, 4)], files)


class Shown:
    def __init__(self):
        self.said = []

    def update(self, **fields):
        self.said.append(fields)


def test_the_stage_joins_its_shards_and_counts(tmp_path):
    prompts, line, breaths = tmp_path / "prompts.parquet", Shown(), []
    tables.write_rows(prompts, PROMPTS, Prompt)
    metrics = sampling.generate(
        tmp_path, line, prompts=prompts, generator=Pretended(), seed=seed, shards=tmp_path / "shards",
        settings=GenerateConfig(candidates=4, shard_prompts=2), breathe=breaths.append,
    )  # fmt: skip
    rows = tables.read_rows(tmp_path / sampling.GENERATE.writes[0], Candidate)
    assert [(r.prompt_id, r.index) for r in rows] == [(f"p{i}", k) for i in range(5) for k in range(4)]
    assert metrics.pop("tokens_per_second") > 0
    assert metrics == {
        "candidates": 20, "tokens": 40, "length_mean": 2.0, "cut_off_share": 0.25, "empty_share": 0.0, "duplicate_share": 0.0,
    }  # fmt: skip
    assert breaths == ["shard"] * 3
    assert line.said[-2] == {"done": 5} and "k tokens/s" in line.said[-1]["text"]


def test_shards_of_an_older_version_are_used(tmp_path):
    """They have no digests. Some of the shards are sampled today, or none."""
    prompts = tmp_path / "prompts.parquet"
    tables.write_rows(prompts, PROMPTS, Prompt)
    expected, _ = ask(Pretended(), tmp_path / "new")
    for kept in (3, 2):
        folder = tmp_path / str(kept)
        ask(Pretended(), folder)
        for file in sorted(folder.glob("0*.parquet"))[:kept]:
            older = tables.read_table(file, [name for name in tables.schema(Candidate).names if name != "digest"])
            tables.pq.write_table(older, file)
        metrics = sampling.generate(
            folder, Shown(), prompts=prompts, generator=None, seed=seed, shards=folder,
            settings=GenerateConfig(candidates=2, shard_prompts=2), breathe=lambda kind: None,
        )  # fmt: skip
        assert metrics["duplicate_share"] == 0.0 and metrics["candidates"] == 10
        rows = tables.read_rows(folder / "candidates.parquet", Candidate)
        without = [dataclasses.replace(row, digest=None) for row in expected]
        assert [dataclasses.replace(row, digest=None) for row in rows] == without
        assert answers.digests(folder / "candidates.parquet").tolist() == [row.digest for row in expected]


def measured(folder, rows, seconds=2.0):
    tables.write_rows(folder / "candidates.parquet", rows, Candidate)
    return sampling.measure(folder / "candidates.parquet", seconds)


def test_metrics_by_hand(tmp_path):
    """Four answers of the same two tokens to one prompt, the first cut off, the others without text."""
    blanks = ["a", " ", "\u2003\n", ""]
    rows = [candidate(index=k, text=blanks[k], finish_reason="stop" if k else "length") for k in range(4)]
    assert measured(tmp_path, rows) == {
        "candidates": 4, "tokens": 8, "tokens_per_second": 4.0, "length_mean": 2.0, "cut_off_share": 0.25, "empty_share": 0.75,
        "duplicate_share": 0.75,
    }  # fmt: skip
    assert measured(tmp_path, [], 0.0)["tokens_per_second"] == 0.0


def test_equal_answers_to_other_prompts_are_no_duplicates(tmp_path):
    first = [candidate("p", k, ids) for k, ids in enumerate([(7, 2), (8, 2), (7, 2)])]
    second = [candidate("q", k, ids) for k, ids in enumerate([(7, 2), (8, 2), (9, 2)])]
    assert measured(tmp_path, first + second)["duplicate_share"] == pytest.approx(1 / 6)


@pytest.mark.slow
def test_no_pandas_is_imported(tmp_path):
    """It would be 55 MB of the controller."""
    code = f"""
from pathlib import Path
from selfplay.storage import tables
tables.leave_pandas_out()
from test_generate import test_the_stage_joins_its_shards_and_counts
test_the_stage_joins_its_shards_and_counts(Path({str(tmp_path)!r}))
import sys
assert "pandas" not in sys.modules
"""
    env = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
