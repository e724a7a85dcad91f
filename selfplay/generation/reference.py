"""The candidates' log-probabilities under another policy than the one that sampled them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.generation.generator import Generator
from selfplay.progress import Line
from selfplay.storage import tables
from selfplay.types import Candidate, ReferenceLogp

Floats = NDArray[np.float64]


def reference_logps(
    path: Path,
    line: Line,
    *,
    generator: Generator | None,
    prompts: Path,
    candidates: Path,
    shards: Path,
    shard_prompts: int,
    breathe: Callable[[str], None],
) -> None:
    """Write the log-probability of each candidate (nats, summed) under the policy in the engine.

    The engine scores them, not the trainer: both sides of the log-ratio then have its arithmetic. Finished shards are not
    scored again. generator: None where the reference is the policy of the candidates' own log-probabilities.
    """
    keys = tables.read_table(candidates, ("prompt_id", "index", "logp"), row_type=Candidate)
    if generator is None:
        line.update(text="the reference samples this round: implicit margins are 0")
        logps = tables.to_array(keys["logp"])
    else:
        line.update(total=keys.num_rows)
        logps = _logps(
            generator, prompts, candidates, shards, shard_prompts, breathe, lambda done: line.update(done=done)
        )
    with tables.writing(path, ReferenceLogp) as file:
        file.table(keys.set_column(keys.column_names.index("logp"), "logp", pa.array(logps)))


def score_anew(
    candidates: Path,
    line: Line,
    *,
    generator: Generator,
    prompts: Path,
    shards: Path,
    shard_prompts: int,
    breathe: Callable[[str], None],
) -> None:
    """Replace the log-probabilities in a file of candidates by those under the policy in the engine. Finished shards are not
    scored again."""
    count = tables.count_rows(candidates)
    logps = _logps(
        generator, prompts, candidates, shards, shard_prompts, breathe,
        lambda done: line.update(text=f"the policy scores {done} of {count} candidates"),
    )  # fmt: skip
    start = 0
    with tables.writing(candidates, Candidate) as file:
        for rows in tables.each_group(candidates, row_type=Candidate):
            own = pa.array(logps[start : start + rows.num_rows])
            file.table(rows.set_column(rows.column_names.index("logp"), "logp", own))
            start += rows.num_rows


def _logps(
    generator: Generator,
    prompts: Path,
    candidates: Path,
    shards: Path,
    shard_prompts: int,
    breathe: Callable[[str], None],
    on_progress: Callable[[int], None],
) -> Floats:
    """The log-probabilities (N,) under the policy in the engine, a shard at a time."""
    count = tables.count_rows(candidates)
    per_prompt = count // tables.count_rows(prompts)
    rows = shard_prompts * per_prompt
    shards.mkdir(parents=True, exist_ok=True)
    found = []
    for start in range(0, count, rows):
        shard, here = shards / f"{start:08d}.parquet", min(rows, count - start)
        if not shard.exists():
            breathe("shard")
            told = functools.partial(_from, start, on_progress)
            values = generator.answer_logps(prompts, candidates, start, here, per_prompt, told)
            tables.write_table(shard, pa.table({"logp": values}))
        found.append(tables.read_array(shard, "logp"))
        on_progress(start + here)
    return np.concatenate(found)


def _from(start: int, on_progress: Callable[[int], None], done: int) -> None:
    on_progress(start + done)
