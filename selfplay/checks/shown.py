"""What answers of a run already showed: of its newest round, or of the shards that it has so far."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.rewards.early_signs import advice
from selfplay.storage import tables
from selfplay.types import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    where: str  # «round 3», or «the first 64 answers of round 3»
    answers: int
    cut_off: float  # share that hit the limit of tokens
    length: float  # mean tokens of an answer


def shown(run_dir: Path) -> Shown | None:
    """What the newest answers of a run show; None where it has none, or retention has deleted them."""
    for folder in sorted((run_dir / "rounds").glob("[0-9]*"), reverse=True):
        whole = folder / "generate" / "candidates.parquet"
        files = [whole] if whole.is_file() else sorted(folder.glob("generate-*.shards/[0-9]*.parquet"))
        columns = [tables.read_table(path, ("n_tokens", "finish_reason"), row_type=Candidate) for path in files]
        if count := sum(table.num_rows for table in columns):
            lengths = np.concatenate([tables.to_array(table["n_tokens"]) for table in columns])
            cut = sum(reason != "stop" for table in columns for reason in table["finish_reason"].to_pylist())
            name = f"round {int(folder.name)}"
            return Shown(
                where=name if whole.is_file() else f"the first {count:,} answers of {name}",
                answers=count,
                cut_off=cut / count,
                length=float(lengths.mean()),
            )
    return None


def words(found: Shown) -> str:
    """The same in words."""
    return f"{found.where}: {found.length:.0f} tokens an answer, {found.cut_off:.0%} cut off"


def answers(config: Config, run_dir: Path) -> Iterator[Finding]:
    """A warning where more of the newest answers were cut off than the guard allows; nothing where there are none."""
    found, limit = shown(run_dir), config.guard.cut_off
    if found is None:
        return
    most = min((level for level in (limit.warn, limit.stop) if level is not None), default=1.0)
    if found.cut_off > most:
        what = advice("cut_off", found.cut_off, config.pairs.cut_off)
        yield Finding.warning("answers", f"{words(found)}, more than guard.cut_off allows ({most:.0%}): {what}")
    else:
        yield Finding.ok("answers", words(found))
