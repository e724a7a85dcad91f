"""The stage `prompts`: the prompts of a round are drawn from a pool that may grow, every one once an epoch in a seeded order.

A draw follows from the ledger and the seed alone, so a round whose folder is gone draws the same prompts again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfplay import seeds
from selfplay.config import BreadthConfig, PromptsConfig
from selfplay.methods.breadth import evenness
from selfplay.progress import Line
from selfplay.prompts.draws import Draws, ids
from selfplay.prompts.pool import Pool
from selfplay.stage import Metrics, Stage
from selfplay.storage import tables
from selfplay.types import Drawn

PROMPTS = Stage(name="prompts", writes=("prompts.parquet",), unit="prompts", log="trainer")

Embed = Callable[[Path, int], dict[str, Any]]
"""(file of prompts, how many to keep) → the trainer's answer: kept, clusters, distances, seconds (embed_job.embed)."""


def prompts(
    out: Path,
    line: Line,
    *,
    pool: Pool,
    draws: Draws,
    index: int,
    settings: PromptsConfig,
    breadth: BreadthConfig,
    embed: Embed | None,
) -> Metrics:
    """Draw the prompts of round `index` and write them to prompts.parquet, in the order in which they were drawn.

    With `embed` more are drawn (drawn.parquet), and those are kept that stand for all (clusters.parquet says how). The
    ledger hears of the draw from `draws.record`, once the stage has its folder. Raises InputError at the end of the prompts.
    """
    count = math.ceil(settings.per_round * (1 if embed is None else breadth.oversample))
    levels = draws.levels(index)
    drawn = levels.next(draws.orders, count, settings.at_end)
    found, metrics = ids(levels, drawn), dict[str, float]()
    if embed is not None:
        pool.write(found, out / "drawn.parquet")
        line.update(text=f"choosing among {len(found)}")
        found, metrics = _representatives(out, found, min(settings.per_round, len(found)), embed)
    pool.write(found, out / "prompts.parquet")
    line.update(done=len(found), text="")
    times = np.bincount(drawn, minlength=len(levels.level)).astype(np.int32)
    epoch, offset = levels.after(times).cursor()
    return {"count": len(found), "epoch": epoch, "offset": offset, "pool": len(levels.level), **metrics}


def drawn_ahead(draws: Draws, index: int, settings: PromptsConfig) -> list[str]:
    """prompt_ids that the round which opens next will draw, in their order, as long as no other prompts join before.

    Raises InputError at the end of the prompts.
    """
    levels = draws.levels_ahead(index)
    return ids(levels, levels.next(draws.orders, settings.per_round, settings.at_end))


def _representatives(out: Path, drawn: Sequence[str], keep: int, embed: Embed) -> tuple[list[str], Metrics]:
    """Those of the prompts that stand for all; writes clusters.parquet."""
    found = embed(out / "drawn.parquet", keep)
    kept = set(found["kept"])
    clusters = [
        Drawn(prompt_id=prompt_id, cluster=cluster, distance=distance, kept=i in kept)
        for i, (prompt_id, cluster, distance) in enumerate(
            zip(drawn, found["clusters"], found["distances"], strict=True)
        )
    ]
    tables.write_rows(out / "clusters.parquet", clusters, Drawn)
    sizes = Counter[int](found["clusters"])
    metrics = {
        "drawn": len(drawn),
        "passed_over": len(drawn) - len(kept),
        "clusters": len(sizes),
        "cluster_evenness": evenness(found["clusters"]),
        "largest_cluster_share": max(sizes.values()) / len(drawn),
        "seconds_embed": found["seconds"],
    }
    return [drawn[i] for i in sorted(kept)], metrics


def subset(pool: Sequence[str], count: int, *parts: object) -> list[str]:
    """`count` prompt_ids in a seeded random order."""
    return sorted(pool, key=lambda prompt_id: seeds.derive(*parts, prompt_id))[:count]
