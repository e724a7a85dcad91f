"""The candidates' log-probabilities under another policy than the one that sampled them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.generation.generator import Generator, Range
from selfplay.progress import Line
from selfplay.storage import seals, tables
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
    """The log-probabilities (N,) under the policy in the engines, shard by shard."""
    count = tables.count_rows(candidates)
    per_prompt = count // tables.count_rows(prompts)
    rows = shard_prompts * per_prompt
    shards.mkdir(parents=True, exist_ok=True)
    files = {start: shards / f"{start:08d}.parquet" for start in range(0, count, rows)}
    sizes = {start: min(rows, count - start) for start in files}
    missing = [start for start, file in files.items() if not seals.is_whole(file)]
    there = count - sum(sizes[start] for start in missing)
    on_progress(there)
    generator.score(
        prompts,
        candidates,
        [Range(start=start, count=sizes[start], done=functools.partial(_keep, files[start])) for start in missing],
        per_prompt,
        on_progress=lambda done: on_progress(there + done),
        before_piece=lambda: breathe("shard"),
    )
    return np.concatenate([tables.read_array(file, "logp") for file in files.values()])


def _keep(shard: Path, logps: list[float]) -> None:
    tables.write_table(shard, pa.table({"logp": pa.array(logps, pa.float64())}))
