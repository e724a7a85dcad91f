"""The stage `generate`: K candidates for each prompt, in shards that are never sampled twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from selfplay.generation.generator import Generator
from selfplay.storage import tables
from selfplay.types import Candidate, Prompt


def generate(
    generator: Generator,
    prompts: Sequence[Prompt],
    *,
    candidates: int,
    seed: Callable[[str], int],
    shards: Path,
    shard_prompts: int,
    on_progress: Callable[[int], None],
    before_shard: Callable[[], None] = lambda: None,
    max_tokens: int | None = None,
) -> list[Candidate]:
    """Candidates of all prompts, prompt by prompt. A finished shard in the folder `shards` is read, not sampled again.

    `seed`: prompt_id → its sampling seed. `max_tokens`: the longest candidate, by default what the generator is set to.
    `on_progress` gets the number of prompts done.
    """
    shards.mkdir(parents=True, exist_ok=True)
    rows: list[Candidate] = []
    for start in range(0, len(prompts), shard_prompts):
        part = prompts[start : start + shard_prompts]
        path = shards / f"{start:08d}.parquet"
        if not path.exists():
            before_shard()
            sampled = generator.generate(
                [(p.prompt_id, p.prompt_ids, seed(p.prompt_id)) for p in part],
                candidates=candidates,
                max_tokens=max_tokens,
                on_progress=lambda done, start=start: on_progress(start + done),  # type: ignore[misc]
            )
            tables.write_rows(path, sampled, Candidate)
        rows += tables.read_rows(path, Candidate)
        on_progress(start + len(part))
    return rows


def metrics(rows: Sequence[Candidate], seconds: float) -> dict[str, float]:
    texts = Counter((r.prompt_id, tuple(r.token_ids)) for r in rows)
    tokens = sum(r.n_tokens for r in rows)
    n = max(len(rows), 1)
    return {
        "candidates": len(rows),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "length_mean": tokens / n,
        "cut_off_share": sum(r.finish_reason != "stop" for r in rows) / n,
        "empty_share": sum(not r.text.strip() for r in rows) / n,
        "duplicate_share": 1 - len(texts) / n,
    }
