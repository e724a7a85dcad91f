"""The stage `generate`: K candidates for each prompt, in shards that are never sampled twice.

Ids and texts go from file to file. The controller moves the shards' bytes into one file and reads the columns it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selfplay.config import GenerateConfig
from selfplay.generation.generator import Ask, Generator, Sampling, Shard
from selfplay.models import thinking
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples
from selfplay.storage import answers, folders, seals, tables
from selfplay.types import Candidate, Policy, Prompt

GENERATE = Stage(
    name="generate",
    reads=("prompts/prompts.parquet",),
    writes=("candidates.parquet",),
    unit="prompts",
    log="generator",
    space=samples,
)


def generate(
    out: Path,
    line: Line,
    *,
    prompts: Path,
    generator: Generator,
    settings: GenerateConfig,
    seed: Callable[[str], int],
    shards: Path,
    breathe: Callable[[str], None],
    on_shard: Callable[[int, Path], None] = lambda start, file: None,
    policy: Policy | None = None,
) -> Metrics:
    """Sample candidates for every row of `prompts` into `out`/candidates.parquet, with a policy, by default the one that serves.

    `seed` gives each prompt_id its sampling seed. `breathe("shard")` is called before each shard that is sampled; what it
    raises ends the stage. Finished shards stay in the folder `shards` for the next try. `on_shard` as in `sample`.
    """
    began = time.monotonic()
    files = sample(
        generator,
        prompts,
        candidates=settings.candidates,
        seed=seed,
        shards=shards,
        shard_prompts=settings.shard_prompts,
        on_progress=lambda done: line.update(done=done),
        before_shard=lambda: breathe("shard"),
        on_shard=on_shard,
        policy=policy,
    )
    seconds = time.monotonic() - began
    candidates = out / "candidates.parquet"
    answers.join(files, candidates)
    metrics = measure(candidates, seconds)
    line.update(text=f"{metrics['tokens_per_second'] / 1000:.1f} k tokens/s")
    return metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Prompts that a policy is to answer, for few of them."""

    rows: Sequence[Prompt]
    policy: Policy | None = None
    """None for the one that serves."""
    seed: Callable[[str], int]
    """Gives each prompt_id its sampling seed."""
    shards: Path
    """A folder for these prompts and settings alone: finished shards stay there, and are not sampled again."""
    candidates: int = 1
    max_tokens: int | None = None
    """The longest answer; by default what the generator is set to."""
    sampling: Sampling | None = None
    """By default what the generator is set to."""


def ask(
    generator: Callable[[], Generator],
    requests: Sequence[Request],
    *,
    shard_prompts: int,
    on_progress: Callable[[int], None] = lambda done: None,
    before_shard: Callable[[], None] = lambda: None,
) -> list[list[Candidate]]:
    """The candidates of each request as records, prompt by prompt. For few prompts, since all answers are in memory.

    Several policies answer side by side where there are several engines. `generator` is called where something has to be
    sampled. The prompts of a request are written to its `shards`/asked.parquet.
    """
    asks, files, there = [], [], 0
    for request in requests:
        folders.make(request.shards)
        asked = request.shards / "asked.parquet"
        if request.rows:
            tables.write_rows(asked, request.rows, Prompt)
        seeds = [request.seed(row.prompt_id) for row in request.rows]
        every, missing = cut(request.shards, seeds, shard_prompts)
        files.append([shard.file for shard in every])
        there += len(seeds) - sum(len(shard.seeds) for shard in missing)
        if missing:
            asks.append(
                Ask(
                    prompts=asked,
                    shards=missing,
                    policy=request.policy,
                    candidates=request.candidates,
                    max_tokens=request.max_tokens,
                    sampling=request.sampling,
                )
            )
    on_progress(there)
    if asks:
        generator().sample(asks, on_progress=lambda done: on_progress(there + done), before_shard=before_shard)
    return [[row for file in of_request for row in tables.each_row(file, Candidate)] for of_request in files]


def sample(
    generator: Generator,
    prompts: Path,
    *,
    candidates: int,
    seed: Callable[[str], int],
    shards: Path,
    shard_prompts: int,
    on_progress: Callable[[int], None] = lambda done: None,
    before_shard: Callable[[], None] = lambda: None,
    on_shard: Callable[[int, Path], None] = lambda start, file: None,
    policy: Policy | None = None,
) -> list[Path]:
    """Sample candidates for every row of `prompts`; returns the shards' files, in the order of the prompts.

    A shard has the candidates of `shard_prompts` prompts. Its file appears whole, and one that is there is not sampled again:
    the folder `shards` belongs to these prompts and settings alone. `seed` gives each prompt_id its sampling seed.
    `on_progress` gets the number of prompts done. `before_shard` is called before each shard that is handed to an engine.
    `on_shard` gets the number of the first prompt and the file of each shard that is whole, in any order; first come those that
    were there before. All three are called in the caller's thread. `policy` is the one that samples, by default the one that
    serves; where nothing is left to sample, the engines go on with theirs.
    """
    folders.make(shards)
    seeds = [seed(prompt_id) for prompt_id in tables.read_column(prompts, "prompt_id")]
    every, missing = cut(shards, seeds, shard_prompts)
    left = {shard.start for shard in missing}
    there = 0
    for shard in every:
        if shard.start not in left:
            there += len(shard.seeds)
            on_shard(shard.start, shard.file)
    on_progress(there)
    if missing:
        generator.sample(
            [Ask(prompts=prompts, shards=missing, candidates=candidates, policy=policy)],
            on_progress=lambda done: on_progress(there + done),
            before_shard=before_shard,
            on_shard=lambda shard, sampled: on_shard(shard.start, shard.file),
        )
    return [shard.file for shard in every]


def cut(folder: Path, seeds: Sequence[int], size: int) -> tuple[list[Shard], list[Shard]]:
    """All shards of some prompts, and those of them that have no file yet, or one that is damaged."""
    every = [
        Shard(start=start, seeds=seeds[start : start + size], file=folder / f"{start:08d}.parquet")
        for start in range(0, len(seeds), size)
    ]
    return every, [shard for shard in every if not seals.is_whole(shard.file)]


def measure(candidates: Path, seconds: float) -> dict[str, float]:
    """Metrics of a file of candidates, prompt by prompt; `seconds` is how long sampling them took."""
    columns = tables.read_table(candidates, ("index", "n_tokens", "finish_reason", "thinking"), row_type=Candidate)
    tokens, rows = int(tables.to_array(columns["n_tokens"]).sum()), columns.num_rows
    n = max(rows, 1)
    empty = sum(
        _count(pc.equal(pc.utf8_ltrim_whitespace(t["text"]), "")) for t in tables.each_group(candidates, ["text"])
    )
    prompts = np.cumsum(tables.to_array(columns["index"]) == 0)
    return {
        "candidates": rows,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "length_mean": tokens / n,
        "cut_off_share": _count(pc.not_equal(columns["finish_reason"], "stop")) / n,
        "empty_share": empty / n,
        "duplicate_share": 1 - _distinct(prompts, answers.digests(candidates)) / n,
        **thinking.metrics(columns["thinking"].to_pylist()),
    }


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _distinct(prompts: NDArray[np.int64], digests: NDArray[np.int64]) -> int:
    """How many answers are left where equal answers to a prompt count once; both arrays are (N,)."""
    order = np.lexsort((digests, prompts))
    prompts, digests = prompts[order], digests[order]
    return min(len(order), 1) + int(((prompts[1:] != prompts[:-1]) | (digests[1:] != digests[:-1])).sum())
