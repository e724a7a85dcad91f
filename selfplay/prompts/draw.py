"""The stage `prompts`: draw a round's prompts from a pool that may grow, every one once an epoch in a seeded order.

A draw takes the prompts of the lowest level: those drawn least often. The levels follow from the artifacts of earlier
rounds alone, so a round that was killed draws the same prompts again. A prompt that joins later takes a random place in
the order of the epoch that runs, and waits for the next epoch where that is among those drawn already: new prompts are as
frequent in the next draws as in the pool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from selfplay import seeds
from selfplay.errors import InputError

Cursor = tuple[int, int]  # epoch: the lowest level of the pool; offset: prompts above it


def levels(
    pool: Mapping[str, int | None], drawn: Mapping[str, int], opened: Mapping[int, Cursor], run_seed: int
) -> dict[str, int]:
    """Level of every prompt of the pool: how often it was drawn, counted on from the epoch in which it joined.

    pool: prompt_id → first round that may draw it, or None. drawn: prompt_id → times drawn in earlier rounds. opened: the cursor at the start of each round that prompts joined in.
    """
    joined = Counter(first or 0 for first in pool.values())
    before = {index: sum(n for other, n in joined.items() if other < index) for index in joined}
    found = {}
    for prompt_id, first in pool.items():
        start = 0
        if first:
            epoch, offset = opened[first]
            # Its place in this epoch's order is among those that were drawn already: it waits for the next epoch.
            passed = _place(run_seed, epoch, prompt_id) * before[first] < offset * 2**63
            start = epoch + passed
        found[prompt_id] = start + drawn.get(prompt_id, 0)
    return found


def cursor(levels: Mapping[str, int]) -> Cursor:
    """Where the pool stands: its lowest level, and how many prompts are above it."""
    epoch = min(levels.values(), default=0)
    return epoch, sum(level > epoch for level in levels.values())


def draw(levels: Mapping[str, int], drawn: Mapping[str, int], count: int, run_seed: int, at_end: str) -> list[str]:
    """The next `count` prompt_ids: the lowest level first, each level in an order of its own.

    Fewer where the pool, or with `at_end` «stop» what was never drawn of it, is smaller. Raises InputError when all
    prompts were drawn and `at_end` is «stop».
    """
    left = [p for p in levels if at_end != "stop" or not drawn.get(p)]
    if not left:
        raise InputError("every prompt was drawn once", "add prompts, or set prompts.at_end to reshuffle")
    return sorted(left, key=lambda p: (levels[p], _place(run_seed, levels[p], p)))[:count]


def _place(run_seed: int, epoch: int, prompt_id: str) -> int:
    """Place in the order of an epoch, uniform in 0 … 2^63 − 1."""
    return seeds.derive(run_seed, "prompts", epoch, prompt_id)


def subset(pool: Sequence[str], count: int, *parts: object) -> list[str]:
    """`count` prompt_ids in a seeded random order."""
    return sorted(pool, key=lambda prompt_id: seeds.derive(*parts, prompt_id))[:count]
