"""The stage `generate`: K candidates for each prompt, in shards that are never sampled twice.

Ids and texts go from file to file. The controller reads rows in Arrow, a row group at a time, and only to join the shards.
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
) -> Metrics:
    """Sample candidates for every row of `prompts` into `out`/candidates.parquet, with the policy that is in the engine.

    `seed` gives each prompt_id its sampling seed. `breathe("shard")` is called before each shard that is sampled; what it
    raises ends the stage. Finished shards stay in the folder `shards` for the next try.
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
    )
    seconds = time.monotonic() - began
    tally = Tally()
    with tables.writing(out / "candidates.parquet", Candidate) as joined:
        for file in files:
            for table in tables.each_group(file, row_type=Candidate):
                rows = answers.with_digests(table)
                joined.table(rows)
                tally.add(rows)
    metrics = tally.metrics(seconds)
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
    max_tokens: int | None = None,
) -> list[Path]:
    """Sample candidates for every row of `prompts`; returns the shards' files, in the order of the prompts.

    A shard has the candidates of `shard_prompts` prompts. Its file appears whole, and one that is there is not sampled again:
    the folder `shards` belongs to these prompts and settings alone. `seed` gives each prompt_id its sampling seed.
    `max_tokens` is the longest candidate, by default what the generator is set to. `on_progress` gets the number of prompts
    done. `before_shard` is called before each shard that is sampled.
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
        on_progress(end)
    return files


class Tally:
    """Metrics of candidates that come table by table, prompt by prompt."""

    def __init__(self) -> None:
        self._rows = self._tokens = self._cut_off = self._empty = self._prompts = 0
        self._answers: list[NDArray[np.int64]] = []  # (N, 2): number of the prompt, digest of the answer

    def add(self, table: pa.Table) -> None:
        """Count the rows of a table with the columns of `Candidate`, the digests included."""
        first = tables.to_array(table["index"]) == 0
        prompt = self._prompts + np.cumsum(first)
        self._prompts += int(first.sum())
        self._answers.append(np.stack([prompt, tables.to_array(table["digest"])], axis=1))
        self._rows += table.num_rows
        self._tokens += int(pc.sum(table["n_tokens"]).as_py() or 0)
        self._cut_off += int(pc.sum(pc.not_equal(table["finish_reason"], "stop")).as_py() or 0)
        self._empty += int(pc.sum(pc.equal(pc.utf8_ltrim_whitespace(table["text"]), "")).as_py() or 0)

    def metrics(self, seconds: float) -> dict[str, float]:
        """What was counted; `seconds` is how long sampling took."""
        n = max(self._rows, 1)
        return {
            "candidates": self._rows,
            "tokens": self._tokens,
            "tokens_per_second": self._tokens / seconds if seconds > 0 else 0.0,
            "length_mean": self._tokens / n,
            "cut_off_share": self._cut_off / n,
            "empty_share": self._empty / n,
            "duplicate_share": 1 - self._distinct() / n,
        }

    def _distinct(self) -> int:
        """How many answers are left where equal answers to a prompt count once."""
        if not self._rows:
            return 0
        rows = np.concatenate(self._answers)
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        return 1 + int((rows[1:] != rows[:-1]).any(axis=1).sum())
