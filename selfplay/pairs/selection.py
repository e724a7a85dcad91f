"""Which base pairs are kept: ranked by alignment potential or by another metric of `kinds.SELECTIONS`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfplay import seeds
from selfplay.config import PairsConfig
from selfplay.kinds import SELECTIONS, resolve
from selfplay.methods.difficulty import easiest
from selfplay.methods.potential import keep_top
from selfplay.methods.selection import Margins
from selfplay.pairs.base import UNFIT
from selfplay.storage import tables
from selfplay.types import RankedPair

SMALL_SET = 64  # below this many pairs the statistics come from the recent rounds together (AP)

Floats = NDArray[np.float64]
NO_MARGINS: tuple[Floats, Floats] = (np.zeros(0), np.zeros(0))


def margin_arrays(pairs: Sequence[RankedPair], signed: bool) -> tuple[Floats, Floats]:
    """Explicit and implicit margins, (N,) each."""
    implicit = [pair.implicit_signed if signed else pair.implicit_margin for pair in pairs]
    return np.array([pair.explicit_margin for pair in pairs], np.float64), np.array(implicit, np.float64)


def read_margins(path: Path, signed: bool) -> tuple[Floats, Floats]:
    """Explicit and implicit margins of the pairs in a file that statistics may use, (N,) each."""
    table = tables.read_table(
        path, ("explicit_margin", "implicit_signed" if signed else "implicit_margin", "dropped_because")
    )
    fit = [why not in UNFIT for why in table["dropped_because"].to_pylist()]
    explicit, implicit = (tables.to_array(table.column(i)).astype(np.float64)[fit] for i in range(2))
    return explicit, implicit


def select(
    pairs: Sequence[RankedPair],
    settings: PairsConfig,
    seed: int,
    recent: tuple[Floats, Floats] = NO_MARGINS,
) -> list[RankedPair]:
    """The same pairs with `potential` set, each kept, or dropped with the reason.

    `recent`: margins of the base pairs of earlier rounds, which join the statistics of a small set.
    """
    eligible = [i for i, pair in enumerate(pairs) if pair.dropped_because is None]
    chosen_from = [pairs[i] for i in eligible]
    explicit, implicit = margin_arrays(chosen_from, settings.signed)
    small = len(eligible) < SMALL_SET
    margins = Margins(
        explicit=explicit,
        implicit=implicit,
        weight=settings.weight,
        reference=(np.append(explicit, recent[0]), np.append(implicit, recent[1])) if small else None,
        chance=np.array([seeds.derive(seed, pair.prompt_id) / 2**63 for pair in chosen_from]),
    )
    scores = resolve(SELECTIONS, settings.selection).score(margins)
    potentials = resolve(SELECTIONS, "potential").score(margins)
    kept = {eligible[k] for k in keep_top(scores, settings.keep)}
    result = list(pairs)
    for i, score, potential in zip(eligible, scores, potentials, strict=True):
        result[i] = dataclasses.replace(
            pairs[i],
            potential=float(potential) if math.isfinite(potential) else None,
            kept_because="base" if i in kept else None,
            dropped_because=None if i in kept else settings.selection if math.isfinite(score) else "nonfinite",
        )
    return result


def easier_alone(pairs: Sequence[RankedPair], means: Mapping[str, float], share: float) -> list[RankedPair]:
    """The same pairs, without those of prompts that are not of the easier share (`pairs.easiest`).

    means: the mean reward of every prompt of the round, by prompt_id. A pair that was dropped before keeps its reason.
    """
    easy = dict(zip(means, easiest(list(means.values()), share).tolist(), strict=True))
    return [
        pair if easy[pair.prompt_id] or pair.dropped_because else dataclasses.replace(pair, dropped_because="difficult")
        for pair in pairs
    ]


def metrics(pairs: Sequence[RankedPair], lost: Counter[str]) -> dict[str, float]:
    """Counts of pairs and of prompts without one, and mean margins of the kept pairs and of all («base_»)."""
    kept = [pair for pair in pairs if pair.kept_because]
    dropped = Counter(pair.dropped_because for pair in pairs if pair.dropped_because)
    values: dict[str, float] = {"base": len(pairs), "kept": len(kept), **lost}
    values |= {f"dropped_{why}": count for why, count in dropped.items()}
    for prefix, group in (("", kept), ("base_", pairs)):
        if group:
            values[f"{prefix}explicit_margin"] = float(np.mean([pair.explicit_margin for pair in group]))
            values[f"{prefix}implicit_margin"] = float(np.mean([pair.implicit_margin for pair in group]))
    potentials = [pair.potential for pair in kept if pair.potential is not None]
    if potentials:
        values["potential"] = float(np.mean(potentials))
    return values


REASONS = {
    "prompts_cut_off": "prompts with every answer cut off",
    "prompts_unscored": "without two scored answers",
    "prompts_equal": "with equal answers",
    "prompts_tied": "with equal rewards",
    "dropped_noise": "margins within the reward's noise",
    "dropped_difficult": "pairs of harder prompts",
    "dropped_disagreement": "pairs that the ensemble disputes",
    "dropped_nonfinite": "values that are not finite",
}


def why_none(found: Mapping[str, float]) -> str:
    """What kept prompts from giving a pair, by the metrics of the stage: «: 3 with equal answers, 1 …»; empty for nothing."""
    said = [f"{found[name]:.0f} {words}" for name, words in REASONS.items() if found.get(name)]
    return f": {', '.join(said)}" if said else ""


ADVICE = {
    "prompts_cut_off": "let answers end: raise generate.max_tokens, or name the token that ends a turn in generate.stop_token_ids",
    "prompts_unscored": "see in the events of the stage score why answers have no score",
    "prompts_equal": "let answers differ: raise generate.temperature or generate.candidates",
    "prompts_tied": "take a reward with finer scores, or other prompts, or raise generate.candidates or generate.temperature: ties "
    "teach nothing",
    "dropped_noise": "lower reward.noise where it is set too high, take a reward with finer scores, or raise generate.candidates or "
    "generate.temperature",
    "dropped_difficult": "raise pairs.easiest",
    "dropped_disagreement": "raise pairs.max_disagreement, or look at why the members of reward.ensemble disagree",
    "dropped_nonfinite": "look at rewards and log-probabilities that are not finite",
}


def advice(found: Mapping[str, float], cut_off_share: float) -> str:
    """What to change where rounds have no pair to train on, by what most prompts or pairs were lost to; empty for nothing.

    found: metrics of the stage, of one round or summed over some; cut_off_share: of all answers.
    """
    cause = max(ADVICE, key=lambda name: found.get(name, 0.0))
    if not found.get(cause):
        return ""
    too_few_are_whole = cause == "prompts_unscored" and cut_off_share >= 0.5
    return ADVICE["prompts_cut_off" if too_few_are_whole else cause]
