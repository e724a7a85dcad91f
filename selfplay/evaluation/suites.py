"""The stage `suite`: candidate and champion do benchmarks, and a capability that falls is a veto.

A suite vetoes when its score has fallen by more than `max_drop` with confidence: when the upper bound of the interval of
(candidate − champion) is below −max_drop. The interval is a percentile bootstrap over the rows of the suite, both policies on the
same rows, two-sided at `evaluate.gate.confidence`. So few rows veto nothing but a fall that is plain to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from selfplay.config import EvaluateConfig, SuiteConfig
from selfplay.errors import RewardError
from selfplay.methods import gate
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples
from selfplay.storage import folders, tables
from selfplay.types import Policy, SuiteAnswer

SUITE = Stage(
    name="suite",
    reads=("train/history.json",),
    writes=("suites.json", "verdict.json"),
    unit="answers",
    log="generator",
    space=samples,
)
BOUNDED = ("score", "score_champion", "difference")
"""Metrics of a suite that have an interval, as NAME_low and NAME_high."""


class Suite(Protocol):
    """A benchmark that is due in this round."""

    @property
    def settings(self) -> SuiteConfig: ...

    @property
    def size(self) -> int | None:
        """How many rows it has; None where the harness counts them."""

    def identity(self) -> str | None:
        """What decides on its scores beside the policy; None where that is not known."""

    def play(self, policies: Sequence[Policy], line: Line) -> list[list[SuiteAnswer]]:
        """What each policy makes of its rows, row by row in the same order."""


Known = Callable[[str, str], list[SuiteAnswer] | None]
"""The champion's answers to a suite (its name, its identity), where an earlier round has them."""


def suites(
    out: Path,
    line: Line,
    *,
    due: Sequence[Suite],
    candidate: Policy,
    champion: Policy,
    known: Known,
    settings: EvaluateConfig,
    seed: Callable[[str], int],
) -> Metrics:
    """Have both policies do each suite; write their answers, who was asked what (suites.json), and the vetoes (verdict.json).

    `seed` gives each suite the seed of its bootstrap. Metrics are `NAME/score`, `NAME/difference` and so on.
    """
    metrics: Metrics = {}
    vetoes: list[str] = []
    identities: dict[str, str | None] = {}
    for suite in due:
        name = suite.settings.name
        identity = identities[name] = suite.identity()
        before = None if identity is None else known(name, identity)
        line.update(text=name, done=0)
        if before is None:
            rows, theirs = suite.play([candidate, champion], line)
        else:
            (rows,), theirs = suite.play([candidate], line), before
            if [row.prompt_id for row in rows] != [row.prompt_id for row in theirs]:  # data behind a task may change
                (theirs,) = suite.play([champion], line)
        found = compare(
            name, rows, theirs, samples=settings.bootstrap, confidence=settings.gate.confidence, seed=seed(name)
        )
        if suite.size is not None:
            found["too_long"] = float(suite.size - len(rows))
        vetoes += veto(suite.settings, found)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        folders.make(out / name)
        tables.write_rows(out / name / "candidate.parquet", rows, SuiteAnswer)
        tables.write_rows(out / name / "champion.parquet", theirs, SuiteAnswer)
        line.update(text=f"{name} {found['score_champion']:.3f} → {found['score']:.3f}")
    folders.write_json(out / "suites.json", identities)
    folders.write_json(out / "verdict.json", {"vetoes": vetoes})
    return metrics


def compare(
    name: str,
    candidate: Sequence[SuiteAnswer],
    champion: Sequence[SuiteAnswer],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> Metrics:
    """Both policies on the same rows: mean scores and their difference with intervals, and every other metric of a row.

    Rows that one of the two has no score for are left out and counted. Raises RewardError where none is left.
    """
    a, b = _scores(candidate), _scores(champion)
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        raise RewardError(f"suite {name}: no row has a score for both policies", "see why its reward gives no score")
    found: Metrics = {"prompts": float(both.sum()), "unscored": float((~both).sum())}
    for key, values in zip(BOUNDED, (a[both], b[both], (a - b)[both]), strict=True):
        low, high = gate.bootstrap(values, samples, confidence, seed)
        found |= {key: float(values.mean()), f"{key}_low": low, f"{key}_high": high}
    for rows, suffix in ((candidate, ""), (champion, "_champion")):
        kept = [row for row, there in zip(rows, both, strict=True) if there]
        for part in kept[0].reward_parts:
            values = [row.reward_parts[part] for row in kept if part in row.reward_parts]
            found[f"{part}{suffix}"] = float(np.mean(values))
        if all(row.n_tokens is not None for row in kept):
            found[f"length{suffix}"] = float(np.mean([row.n_tokens for row in kept]))
            found[f"cut_off{suffix}"] = float(np.mean([row.finish_reason != "stop" for row in kept]))
    return found


def veto(settings: SuiteConfig, found: Metrics) -> list[str]:
    """Why the candidate is rejected, as a list of at most one reason."""
    limit = settings.gate
    if limit is None or not found["difference_high"] < -limit.max_drop:
        return []
    low, high = found["difference_low"], found["difference_high"]
    return [
        f"suite {settings.name}: score {found['score_champion']:.3f} → {found['score']:.3f}, and the upper bound of the difference "
        f"[{low:.3f}, {high:.3f}] is below −{limit.max_drop:g}"
    ]


def _scores(rows: Sequence[SuiteAnswer]) -> NDArray[np.float64]:
    return np.array([np.nan if row.reward is None else row.reward for row in rows], np.float64)
