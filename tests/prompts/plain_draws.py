"""Draws written down plainly: levels in a dict, and all prompts sorted by the hash that is their place."""

from collections import Counter

from selfplay import seeds


def place(run_seed, epoch, prompt_id):
    """Place in the order of an epoch, uniform in 0 … 2^63 − 1."""
    return seeds.derive(run_seed, "prompts", epoch, prompt_id)


def levels(pool, drawn, opened, run_seed):
    """Level of every prompt. pool: prompt_id → first round or None; drawn: times; opened: cursor of each round."""
    joined = Counter(first or 0 for first in pool.values())
    before = {index: sum(n for other, n in joined.items() if other < index) for index in joined}
    found = {}
    for prompt_id, first in pool.items():
        start = 0
        if first:
            epoch, offset = opened[first]
            start = epoch + (place(run_seed, epoch, prompt_id) * before[first] < offset * 2**63)
        found[prompt_id] = start + drawn.get(prompt_id, 0)
    return found


def cursor(found):
    epoch = min(found.values(), default=0)
    return epoch, sum(level > epoch for level in found.values())


def draw(found, drawn, count, run_seed, at_end):
    """The next prompt_ids; none where all were drawn once and that is the end."""
    left = [p for p in found if at_end != "stop" or not drawn.get(p)]
    return sorted(left, key=lambda p: (found[p], place(run_seed, found[p], p)))[:count]
