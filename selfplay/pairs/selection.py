"""The stage `pairs`: from scored candidates to base pairs, ranked, each with why it was kept or dropped."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from selfplay import seeds
from selfplay.config import PairsConfig
from selfplay.methods import margins
from selfplay.methods.potential import alignment_potential, keep_top
from selfplay.types import DISAGREEMENT, Pair, Prompt, Scored

SMALL_SET = 64  # below this many pairs the statistics come from the recent rounds together (methods: AP)


CutOff = Literal["drop", "reject"]
UNFIT = ("noise", "disagreement")  # why a base pair has no part in the statistics that pairs are ranked by


def usable(candidates: Iterable[Scored], cut_off: CutOff = "drop") -> list[Scored]:
    """The responses of one prompt that can be in a pair: scored, each text of tokens once, and whole if cut-offs drop."""
    seen: set[tuple[int, ...]] = set()
    rows = []
    for candidate in candidates:
        ids = tuple(candidate.token_ids)
        scored = candidate.reward is not None and math.isfinite(candidate.reward)
        if (candidate.finish_reason != "stop" and cut_off == "drop") or not scored or not ids or ids in seen:
            continue
        seen.add(ids)
        rows.append(candidate)
    return rows


def rewards(candidates: Sequence[Scored]) -> list[float]:
    """Rewards of candidates that all have one."""
    return [c.reward for c in candidates if c.reward is not None]


def implicit_reward(response: Scored, beta: float) -> float:
    """Implicit reward: that of DPO where the reference has scored the response, else the mean log-probability (SimPO)."""
    if response.reference_logp is not None:
        return margins.implicit_reward_dpo(response.logp, response.reference_logp, beta)
    return margins.implicit_reward(response.logp, response.n_tokens)


def make_pair(prompt: Prompt, chosen: Scored, rejected: Scored, beta: float) -> Pair:
    """The pair of two scored responses. `beta`: scale of DPO's implicit reward."""
    assert chosen.reward is not None and rejected.reward is not None
    signed = implicit_reward(chosen, beta) - implicit_reward(rejected, beta)
    return Pair(
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.prompt_ids,
        chosen_index=chosen.index,
        rejected_index=rejected.index,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_logp=chosen.logp,
        rejected_logp=rejected.logp,
        explicit_margin=chosen.reward - rejected.reward,
        implicit_margin=abs(signed),
        implicit_signed=signed,
    )


def ends(responses: Sequence[Scored]) -> tuple[int, int] | None:
    """Positions of the highest and the lowest reward of usable responses; a cut-off one is never the chosen one."""
    values = rewards(responses)
    found = margins.base_pair(values)
    if found is None or responses[found[0]].finish_reason == "stop":
        return found
    whole = [i for i, response in enumerate(responses) if response.finish_reason == "stop"]
    best = max(whole, key=lambda i: (values[i], -i), default=None)
    return None if best is None or values[best] <= values[found[1]] else (best, found[1])


def disputed(chosen: Scored, rejected: Scored, limit: float | None) -> bool:
    """Whether the members of an ensemble disagree about one of the two by more than `limit` (standard deviations)."""
    return limit is not None and any(c.reward_parts.get(DISAGREEMENT, 0.0) > limit for c in (chosen, rejected))


def base_pairs(
    prompts: Sequence[Prompt],
    candidates: dict[str, list[Scored]],
    noise: float,
    beta: float,
    max_disagreement: float | None = None,
    cut_off: CutOff = "drop",
) -> tuple[list[Pair], Counter[str]]:
    """One pair for each prompt that allows it (highest against lowest reward), and why the others gave none."""
    pairs: list[Pair] = []
    lost: Counter[str] = Counter(prompts_cut_off=0, prompts_unscored=0, prompts_equal=0, prompts_tied=0)
    for prompt in prompts:
        rows = candidates[prompt.prompt_id]
        good = usable(rows, cut_off)
        found = ends(good)
        if found is not None:
            chosen, rejected = good[found[0]], good[found[1]]
            pair = make_pair(prompt, chosen, rejected, beta)
            if pair.explicit_margin <= noise:
                pair = dataclasses.replace(pair, dropped_because="noise")
            elif disputed(chosen, rejected, max_disagreement):
                pair = dataclasses.replace(pair, dropped_because="disagreement")
            pairs.append(pair)
        elif all(r.finish_reason != "stop" for r in rows):
            lost["prompts_cut_off"] += 1
        elif len(good) >= 2:
            lost["prompts_tied"] += 1
        elif len({tuple(r.token_ids) for r in rows}) == 1:
            lost["prompts_equal"] += 1
        else:
            lost["prompts_unscored"] += 1
    return pairs, lost


def scores(pairs: Sequence[Pair], config: PairsConfig, recent: Sequence[Pair], seed: int) -> list[float]:
    """What the pairs are ranked by, (N,): alignment potential or a baseline."""
    m_exp, m_imp = margin_arrays(pairs, config)
    if config.selection == "explicit":
        return list(m_exp)
    if config.selection == "implicit":
        return list(-m_imp)
    if config.selection == "random":
        return [seeds.derive(seed, p.prompt_id) / 2**63 for p in pairs]
    reference = None
    if len(pairs) < SMALL_SET:
        reference = margin_arrays([*pairs, *recent], config)
    return list(alignment_potential(m_exp, m_imp, config.weight, reference=reference))


def margin_arrays(pairs: Sequence[Pair], config: PairsConfig) -> tuple[np.ndarray, np.ndarray]:
    """Explicit and implicit margins, (N,) each; the implicit ones signed if the config says so."""
    implicit = [p.implicit_signed if config.signed else p.implicit_margin for p in pairs]
    return np.array([p.explicit_margin for p in pairs], np.float64), np.array(implicit, np.float64)


def select(pairs: Sequence[Pair], config: PairsConfig, recent: Sequence[Pair], seed: int) -> list[Pair]:
    """The same pairs with `potential` set, and kept or dropped by the configured selection.

    `recent`: base pairs of earlier rounds, for the statistics of a small set.
    """
    eligible = [i for i, p in enumerate(pairs) if p.dropped_because is None]
    ranked = scores([pairs[i] for i in eligible], config, recent, seed)
    potential = scores([pairs[i] for i in eligible], config.model_copy(update={"selection": "potential"}), recent, seed)
    kept = {eligible[k] for k in keep_top(ranked, config.keep)}
    result = list(pairs)
    for i, score, value in zip(eligible, ranked, potential, strict=True):
        result[i] = dataclasses.replace(
            pairs[i],
            potential=value if math.isfinite(value) else None,
            kept_because="base" if i in kept else None,
            dropped_because=None if i in kept else config.selection if math.isfinite(score) else "nonfinite",
        )
    return result


NONE = {
    "prompts_cut_off": "prompts with every answer cut off",
    "prompts_unscored": "without two scored answers",
    "prompts_equal": "with equal answers",
    "prompts_tied": "with equal rewards",
    "dropped_noise": "margins within the reward's noise",
    "dropped_disagreement": "pairs that the ensemble disputes",
    "dropped_nonfinite": "values that are not finite",
}


def why_none(found: Mapping[str, float]) -> str:
    """What kept prompts from giving a pair, by the metrics of the stage: «: 3 with equal answers, 1 …»; empty for nothing."""
    said = [f"{found[name]:.0f} {words}" for name, words in NONE.items() if found.get(name)]
    return f": {', '.join(said)}" if said else ""


def metrics(pairs: Sequence[Pair], lost: Counter[str]) -> dict[str, float]:
    kept = [p for p in pairs if p.kept_because]
    dropped = Counter(p.dropped_because for p in pairs if p.dropped_because)
    values: dict[str, float] = {"base": len(pairs), "kept": len(kept), **lost}
    values |= {f"dropped_{why}": count for why, count in dropped.items()}
    for prefix, group in (("", kept), ("base_", pairs)):
        if group:
            values[f"{prefix}explicit_margin"] = float(np.mean([p.explicit_margin for p in group]))
            values[f"{prefix}implicit_margin"] = float(np.mean([p.implicit_margin for p in group]))
    potentials = [p.potential for p in kept if p.potential is not None]
    if potentials:
        values["potential"] = float(np.mean(potentials))
    return values
