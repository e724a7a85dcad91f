"""Base pairs: of each prompt the response with the highest reward against the one with the lowest."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from selfplay.config import PairsConfig
from selfplay.kinds import IMPLICIT_REWARDS, resolve
from selfplay.methods import margins
from selfplay.pairs.responses import Response, usable
from selfplay.types import RankedPair

UNFIT = ("noise", "disagreement", "difficult")  # why a base pair has no part in the statistics that pairs are ranked by

ImplicitReward = Callable[[Response], float]


def implicit_reward(kind: str, beta: float) -> ImplicitReward:
    """The implicit reward of a response, by its name in the configuration. `beta`: scale of those that have one."""
    reward = resolve(IMPLICIT_REWARDS, kind).reward
    return lambda r: float(reward(r.logp, r.n_tokens, r.reference_logp, beta))


def make_pair(prompt_id: str, chosen: Response, rejected: Response, implicit: ImplicitReward) -> RankedPair:
    """The pair of two responses that have rewards."""
    signed = implicit(chosen) - implicit(rejected)
    return RankedPair(
        prompt_id=prompt_id,
        chosen_index=chosen.index,
        rejected_index=rejected.index,
        chosen_reward=chosen.reward,
        rejected_reward=rejected.reward,
        chosen_logp=chosen.logp,
        rejected_logp=rejected.logp,
        explicit_margin=chosen.reward - rejected.reward,
        implicit_margin=abs(signed),
        implicit_signed=signed,
    )


def ends(responses: Sequence[Response], rejected: str = "lowest") -> tuple[int, int] | None:
    """Places of the chosen and the rejected one among usable responses. The chosen one is never one that was cut off.

    The chosen one has the highest reward. rejected: `pairs.rejected`.
    """
    values = [response.reward for response in responses]
    found = margins.base_pair(values)
    if found is None:
        return None
    best, worst = found
    if not responses[best].whole:
        whole = [i for i, response in enumerate(responses) if response.whole]
        if not whole:
            return None
        best = max(whole, key=lambda i: (values[i], -i))
    other = margins.two_sigma(values, best) if rejected == "two_sigma" else worst
    return None if other is None or values[best] <= values[other] else (best, other)


def disputed(chosen: Response, rejected: Response, limit: float | None) -> bool:
    """Whether the members of an ensemble disagree about one of the two by more than `limit` (standard deviations)."""
    return limit is not None and max(chosen.disagreement, rejected.disagreement) > limit


def base_pairs(
    prompts: Iterable[tuple[str, Sequence[Response]]], settings: PairsConfig, noise: float, beta: float
) -> tuple[list[RankedPair], Counter[str]]:
    """One pair for each prompt that allows it, and how many prompts gave none for what reason.

    prompts: prompt_id and responses. noise: explicit margins at or below this make no pair. beta: see `implicit_reward`.
    """
    implicit = implicit_reward(settings.implicit, beta)
    pairs: list[RankedPair] = []
    lost: Counter[str] = Counter(prompts_cut_off=0, prompts_unscored=0, prompts_equal=0, prompts_tied=0)
    for prompt_id, responses in prompts:
        good = usable(responses, settings.cut_off)
        found = ends(good, settings.rejected)
        if found is None:
            lost[_why_none(responses, good)] += 1
            continue
        chosen, rejected = good[found[0]], good[found[1]]
        pair = make_pair(prompt_id, chosen, rejected, implicit)
        if pair.explicit_margin <= noise:
            pair = dataclasses.replace(pair, dropped_because="noise")
        elif disputed(chosen, rejected, settings.max_disagreement):
            pair = dataclasses.replace(pair, dropped_because="disagreement")
        pairs.append(pair)
    return pairs, lost


def _why_none(responses: Sequence[Response], good: Sequence[Response]) -> str:
    if not any(response.whole for response in responses):
        return "prompts_cut_off"
    if len(good) >= 2:
        return "prompts_tied"
    if len({response.digest for response in responses}) == 1:
        return "prompts_equal"
    return "prompts_unscored"


def every_pair(
    base: RankedPair, responses: Sequence[Response], settings: PairsConfig, noise: float, implicit: ImplicitReward
) -> list[RankedPair]:
    """All pairs that the prompt of a kept base pair can give; the base pair alone where there is no other.

    Their margins are at least a quarter of the widest and above the noise. As in base pairs, the chosen response ended by
    itself, and an ensemble does not dispute any of the two.
    """
    good = usable(responses, settings.cut_off)
    found = [
        make_pair(base.prompt_id, good[i], good[j], implicit)
        for i, j in margins.ordered_pairs([response.reward for response in good])
        if good[i].whole and not disputed(good[i], good[j], settings.max_disagreement)
    ]
    return [pair for pair in found if pair.explicit_margin > noise] or [base]


def finite(value: float | None) -> float:
    """The value, NaN for None."""
    return math.nan if value is None else value
