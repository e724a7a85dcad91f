"""The stage `prompts`: draw a round's prompts from the pool, every one once an epoch in a seeded order."""

from __future__ import annotations

from collections.abc import Sequence

from selfplay import artifacts
from selfplay.errors import InputError

Cursor = tuple[int, int]  # epoch, prompts of it that were drawn


def draw(pool: Sequence[str], cursor: Cursor, count: int, run_seed: int, at_end: str) -> tuple[list[str], Cursor]:
    """The next `count` prompt_ids and the cursor after them; no prompt twice in a draw.

    `pool`: the prompt_ids of the training split. A new epoch has an order of its own. Raises InputError when the pool is
    used up and `at_end` is «stop».
    """
    epoch, offset = cursor
    count = min(count, len(pool))
    drawn: list[str] = []
    seen: set[str] = set()
    while len(drawn) < count:
        order = sorted(pool, key=lambda prompt_id: artifacts.seed(run_seed, "prompts", epoch, prompt_id))
        while offset < len(order) and len(drawn) < count:
            if order[offset] not in seen:
                seen.add(order[offset])
                drawn.append(order[offset])
            offset += 1
        if len(drawn) < count:
            if at_end == "stop":
                if drawn:
                    break
                raise InputError("every prompt was drawn once", "add prompts, or set prompts.at_end to reshuffle")
            epoch, offset = epoch + 1, 0
    return drawn, (epoch, offset)


def subset(pool: Sequence[str], count: int, *parts: object) -> list[str]:
    """`count` prompt_ids in a seeded random order."""
    return sorted(pool, key=lambda prompt_id: artifacts.seed(*parts, prompt_id))[:count]
