"""The stage `score`: an external reward for each candidate, from a supervised reward server or a URL."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfplay.config import ShapingConfig
from selfplay.errors import GuardError, RewardError
from selfplay.methods import shaping
from selfplay.storage import tables
from selfplay.types import DISAGREEMENT, EXTERNAL, MEMBER, Candidate, Prompt, Scored

if TYPE_CHECKING:
    from selfplay.rewards.scorer import Scorer


def score(
    scorer: Scorer,
    prompts: dict[str, Prompt],
    candidates: Sequence[Candidate],
    *,
    identities: tuple[str, ...],
    shards: Path,
    shard_items: int,
    max_missing: float,
    settings: ShapingConfig,
    on_progress: Callable[[int], None],
    before_shard: Callable[[], None] = lambda: None,
    when_scored: Callable[[], None] = lambda: None,
) -> tuple[list[Scored], Counter[str]]:
    """Scored candidates in their order, and why some have no score; finished shards in `shards` are read, not scored again.

    `identities`: the models that score all of them. `when_scored` is called before anything is made of the scores.
    Raises GuardError when others answer, and RewardError when more than a share `max_missing` has no score: missing
    rewards never become training data, and are asked for again by the next call.
    """
    shards.mkdir(parents=True, exist_ok=True)
    rows: list[Scored] = []
    incomplete: list[Path] = []
    reasons: Counter[str] = Counter()
    for start in range(0, len(candidates), shard_items):
        part = candidates[start : start + shard_items]
        path = shards / f"{start:08d}.parquet"
        if not path.exists():
            before_shard()
            items = [(prompts[c.prompt_id].messages, c.text) for c in part]
            answer = scorer.ask(items, lambda done, start=start: on_progress(start + done))  # type: ignore[misc]
            if answer.identities != identities:
                raise GuardError(
                    f"the model behind the {scorer.role} changed during the stage: {answer.identities} instead of {identities}",
                    "see that one and the same model serves, then run the same command again: finished shards are kept",
                )
            reasons += answer.reasons
            tables.write_rows(path, _as_given(scorer, part, answer.scores), Scored)
        found = tables.read_rows(path, Scored)
        incomplete += [path] * any(_missing(scorer, row) for row in found)
        rows += found
        on_progress(start + len(part))
    when_scored()
    try:
        require([None if _missing(scorer, row) else 0.0 for row in rows], max_missing, reasons, scorer.logs)
    except RewardError:
        for path in incomplete:
            path.unlink()
        raise
    return shape(_combined(scorer, rows, identities), settings), reasons


def _missing(scorer: Scorer, row: Scored) -> bool:
    """Whether a row as it was given has no reward, for want of a member's score or of its only one."""
    if scorer.members:
        return any(MEMBER + name not in row.reward_parts for name in scorer.members)
    return row.reward is None


def _as_given(scorer: Scorer, candidates: Sequence[Candidate], scores: np.ndarray) -> list[Scored]:
    """Candidates with the scores (M, N) as they came: a single one as the reward, those of an ensemble as parts."""
    rows = []
    for candidate, column in zip(candidates, scores.T, strict=True):
        values = [float(v) if math.isfinite(v) else None for v in column]
        fields = {f.name: getattr(candidate, f.name) for f in dataclasses.fields(candidate)}
        parts = {MEMBER + name: v for name, v in zip(scorer.members, values, strict=False) if v is not None}
        rows.append(Scored(**fields, reward=None if scorer.members else values[0], reward_parts=parts))
    return rows


def _combined(scorer: Scorer, rows: Sequence[Scored], identities: tuple[str, ...]) -> list[Scored]:
    """The rewards of an ensemble, with the disagreement among the parts; a single reward is the reward already."""
    if not scorer.members:
        return list(rows)
    scores = np.array([[row.reward_parts.get(MEMBER + name, math.nan) for row in rows] for name in scorer.members])
    found = scorer.combine(identities, scores)
    assert found.disagreement is not None
    return [
        dataclasses.replace(row, reward=float(reward), reward_parts=row.reward_parts | {DISAGREEMENT: float(apart)})
        if math.isfinite(reward)
        else row
        for row, reward, apart in zip(rows, found.rewards, found.disagreement, strict=True)
    ]


def shape(rows: Sequence[Scored], settings: ShapingConfig) -> list[Scored]:
    """The same rows, with a reward that is the sum of its parts `external` and those that `settings` names."""
    if not settings.active:
        return list(rows)
    external = np.array([math.nan if row.reward is None else row.reward for row in rows])
    lengths = [row.n_tokens for row in rows]
    terms: dict[str, np.ndarray] = {}
    if settings.length_control:
        prompts = [row.prompt_id for row in rows]
        terms["length_control"] = shaping.length_control(external, lengths, prompts, settings.length_control)
    if settings.length_penalty:
        terms["length_penalty"] = shaping.length_penalty(lengths, settings.length_penalty, settings.length_free)
    if settings.repetition_penalty:
        responses, ngram = [row.token_ids for row in rows], settings.repetition_ngram
        terms["repetition_penalty"] = shaping.repetition_penalty(responses, settings.repetition_penalty, ngram)
    if settings.cut_off_penalty:
        ends = [row.finish_reason for row in rows]
        terms["cut_off_penalty"] = shaping.cut_off_penalty(ends, settings.cut_off_penalty)
    result = []
    for i, row in enumerate(rows):
        if row.reward is None:
            result.append(row)
            continue
        parts = {EXTERNAL: row.reward} | {name: float(term[i]) for name, term in terms.items()}
        result.append(dataclasses.replace(row, reward=sum(parts.values()), reward_parts=row.reward_parts | parts))
    return result


def require(values: Sequence[float | None], max_missing: float, reasons: Counter[str], logs: Sequence[Path]) -> None:
    """Raise RewardError when more than a share `max_missing` of the values is None. `logs`: of the servers that are ours."""
    missing = sum(v is None for v in values)
    if missing > max_missing * len(values):
        why = f": {said(reasons)}" if reasons else ""
        raise RewardError(
            f"{missing} of {len(values)} answers have no reward (limit: a share of {max_missing:g}, reward.max_missing){why}",
            "nothing was trained on" + (f"; see {', '.join(map(str, logs))}" if logs else ""),
        )


def said(reasons: Counter[str]) -> str:
    """The commonest reasons, in a line; those that differ only behind a colon, such as replies of a judge, as one."""
    kinds: dict[str, Counter[str]] = {}
    for reason, count in reasons.items():
        kinds.setdefault(reason.partition(": ")[0], Counter())[reason] += count
    most = sorted(kinds.items(), key=lambda kind: -kind[1].total())[:3]
    return ", ".join(f"{of.total()} × {next(iter(of)) if len(of) == 1 else kind}" for kind, of in most)


def metrics(rows: Sequence[Scored], reasons: Counter[str]) -> dict[str, float]:
    """`missing`: candidates without a reward; `unparsable`: member scores that are missing for want of a verdict."""
    values = [r.reward for r in rows if r.reward is not None]
    unparsable = sum(count for reason, count in reasons.items() if "no verdict" in reason)
    result: dict[str, float] = {"missing": len(rows) - len(values), "unparsable": unparsable}
    if values:
        result |= {"reward_mean": float(np.mean(values)), "reward_std": float(np.std(values))}
    parts = [r.reward_parts for r in rows if r.reward is not None and r.reward_parts]
    return result | {f"part_{name}": float(np.mean([p[name] for p in parts])) for name in (parts[0] if parts else ())}
