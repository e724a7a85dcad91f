"""The stage `pairs`: from scored candidates to base pairs, ranked, each with why it was kept or dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from selfplay.config import PairsConfig
from selfplay.kinds import IMPLICIT_REWARDS, resolve
from selfplay.pairs.base import base_pairs
from selfplay.pairs.responses import Responses
from selfplay.pairs.selection import NO_MARGINS, easier_alone, metrics, read_margins, select
from selfplay.pairs.writing import write_pairs
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples

PAIRS = Stage(
    name="pairs",
    reads=("prompts/prompts.parquet", "generate/candidates.parquet", "score/scored.parquet"),
    writes=("pairs.parquet",),
    log="generator",
    space=samples,
)
REFERENCE = "reference.parquet"  # what the reference says of each candidate, where implicit rewards need it


def pairs(
    out: Path,
    line: Line,
    *,
    prompts: Path,
    candidates: Path,
    scored: Path,
    recent: Sequence[Path],
    score_by_reference: Callable[[Path], None],
    settings: PairsConfig,
    noise: float,
    beta: float,
    seed: int,
) -> Metrics:
    """Make base pairs, rank them, and write all of them to pairs.parquet.

    recent: pairs of earlier rounds, for the statistics of a small set. score_by_reference: writes the log-probabilities of
    all candidates under the reference to a file; it is asked only where implicit rewards need them. noise: `reward.noise`.
    beta: `train.beta`.
    """
    reference = None
    if resolve(IMPLICIT_REWARDS, settings.implicit).NEEDS_REFERENCE:
        reference = out / REFERENCE
        score_by_reference(reference)
    responses = Responses.read(candidates, scored, reference)
    base, lost = base_pairs(responses, settings, noise, beta)
    if settings.easiest < 1:
        base = easier_alone(base, responses.mean_rewards(), settings.easiest)
    earlier = [read_margins(path, settings.signed) for path in recent]
    margins = (
        (np.concatenate([a for a, _ in earlier]), np.concatenate([b for _, b in earlier])) if earlier else NO_MARGINS
    )
    selected = select(base, settings, seed, margins)
    write_pairs(out / "pairs.parquet", selected, prompts, candidates, responses.candidates)
    found = metrics(selected, lost)
    line.update(text=f"{found['kept']:.0f} of {found['base']:.0f} pairs kept")
    return found
