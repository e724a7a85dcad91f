"""The stage `generate`: K candidates for each prompt, in shards that are never sampled twice.

Ids and texts go from file to file. The controller moves the shards' bytes into one file and reads the columns it counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selfplay.config import GenerateConfig
from selfplay.generation.generator import Generator
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples
from selfplay.storage import answers, folders, tables
from selfplay.types import Candidate, Prompt

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
) -> Metrics:
    """Sample candidates for every row of `prompts` into `out`/candidates.parquet, with the policy that is in the engine.

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
    )
    seconds = time.monotonic() - began
    candidates = out / "candidates.parquet"
    answers.join(files, candidates)
    metrics = measure(candidates, seconds)
    line.update(text=f"{metrics['tokens_per_second'] / 1000:.1f} k tokens/s")
    return metrics


def ask(
    generator: Generator,
    rows: Sequence[Prompt],
    *,
    candidates: int,
    seed: Callable[[str], int],
    shards: Path,
    shard_prompts: int,
    on_progress: Callable[[int], None] = lambda done: None,
    before_shard: Callable[[], None] = lambda: None,
    max_tokens: int | None = None,
) -> list[Candidate]:
    """The candidates of some prompts as records, prompt by prompt. For few prompts, since all answers are in memory.

    The prompts are written to `shards`/asked.parquet; the other parameters are those of `sample`.
    """
    if not rows:
        return []
    folders.make(shards)
    asked = shards / "asked.parquet"
    tables.write_rows(asked, rows, Prompt)
    files = sample(
        generator,
        asked,
        candidates=candidates,
        seed=seed,
        shards=shards,
        shard_prompts=shard_prompts,
        on_progress=on_progress,
        before_shard=before_shard,
        max_tokens=max_tokens,
    )
    return [row for file in files for row in tables.each_row(file, Candidate)]


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
    max_tokens: int | None = None,
) -> list[Path]:
    """Sample candidates for every row of `prompts`; returns the shards' files, in the order of the prompts.

    A shard has the candidates of `shard_prompts` prompts. Its file appears whole, and one that is there is not sampled again:
    the folder `shards` belongs to these prompts and settings alone. `seed` gives each prompt_id its sampling seed.
    `max_tokens` is the longest candidate, by default what the generator is set to. `on_progress` gets the number of prompts
    done. `before_shard` is called before each shard that is sampled. `on_shard` gets the number of the first prompt and the
    file of each shard that is whole, those that were there before too.
    """
    folders.make(shards)
    seeds = [seed(prompt_id) for prompt_id in tables.read_column(prompts, "prompt_id")]
    files = []
    for start in range(0, len(seeds), shard_prompts):
        end = min(start + shard_prompts, len(seeds))
        file = shards / f"{start:08d}.parquet"
        if not file.exists():
            before_shard()
            with folders.whole(file) as partial:
                generator.sample(
                    prompts,
                    start,
                    end - start,
                    seeds[start:end],
                    partial,
                    candidates=candidates,
                    max_tokens=max_tokens,
                    on_progress=lambda done, start=start: on_progress(start + done),  # type: ignore[misc]
                )
        files.append(file)
        on_shard(start, file)
        on_progress(end)
    return files


def measure(candidates: Path, seconds: float) -> dict[str, float]:
    """Metrics of a file of candidates, prompt by prompt; `seconds` is how long sampling them took."""
    columns = tables.read_table(candidates, ("index", "n_tokens", "finish_reason"), row_type=Candidate)
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
    }


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _distinct(prompts: NDArray[np.int64], digests: NDArray[np.int64]) -> int:
    """How many answers are left where equal answers to a prompt count once; both arrays are (N,)."""
    order = np.lexsort((digests, prompts))
    prompts, digests = prompts[order], digests[order]
    return min(len(order), 1) + int(((prompts[1:] != prompts[:-1]) | (digests[1:] != digests[:-1])).sum())
