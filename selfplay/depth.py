"""How many further pairs each kept prompt gets, and which (BPO, Wang et al., 2025, arXiv 2411.10914)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfplay import margins
from selfplay.config import PairsConfig
from selfplay.pairs import make_pair, margin_arrays, rewards, usable
from selfplay.potential import alignment_potential
from selfplay.types import Pair, Prompt, Scored


def allocate(closeness: ArrayLike, pool: ArrayLike, budget: int, temperature: float) -> NDArray[np.int64]:
    """Pairs for each prompt, (n,): one each, the rest in proportion to softmax(closeness / temperature).

    closeness (n,) cosine to the centre of the prompt's gradient cluster; pool (n,) pairs that each prompt can give
    (≥ 1). Each entry is in [1, pool]; the excess of a full pool goes to the others; largest remainder makes the sum
    exactly min(budget, pool.sum()). temperature 0 is uniform. Raises ValueError for a budget below n.
    """
    c, most = np.asarray(closeness, np.float64), np.asarray(pool, np.int64)
    n = c.size
    if n == 0:
        return np.zeros(0, np.int64)
    if most.min() < 1 or budget < n:
        raise ValueError(f"every prompt needs one pair: budget {budget} for {n} prompts, smallest pool {most.min()}")
    weights = np.exp((c - c.max()) / temperature) if temperature > 0 else np.ones(n)
    room = most - 1
    left = int(min(budget, most.sum())) - n
    share = np.zeros(n)
    open_ = room > 0
    while left > 0 and open_.any():
        # A weight can underflow to 0; such prompts get their turn when all others are full.
        w = np.where(open_, weights, 0.0)
        w = w if w.sum() > 0 else open_.astype(np.float64)
        share = np.where(open_, left * w / w.sum(), share)
        full = open_ & (share >= room)
        if not full.any():
            break
        share[full] = room[full]
        left -= int(room[full].sum())
        open_ &= ~full
    extra = np.floor(share + 1e-9).astype(np.int64)
    missing = int(min(budget, most.sum())) - n - int(extra.sum())
    remainder = np.where(extra < room, share - extra, -1.0)
    extra[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return 1 + extra


def pools(
    kept: Sequence[Pair], prompts: dict[str, Prompt], candidates: dict[str, list[Scored]], noise: float, beta: float
) -> list[list[Pair]]:
    """For each kept base pair all pairs its prompt can give: margin at least a quarter of the widest, above noise."""
    result = []
    for base in kept:
        rows = usable(candidates[base.prompt_id])
        prompt = prompts[base.prompt_id]
        pool = [make_pair(prompt, rows[i], rows[j], beta) for i, j in margins.ordered_pairs(rewards(rows))]
        result.append([p for p in pool if p.explicit_margin > noise] or [base])
    return result


def deepen(
    kept: Sequence[Pair],
    pools: Sequence[Sequence[Pair]],
    depth: Sequence[int],
    base: Sequence[Pair],
    config: PairsConfig,
) -> list[Pair]:
    """The kept base pairs, each followed by the pairs added to its prompt, best alignment potential first.

    depth (n,): pairs of each prompt, the base pair included. `base`: the round's base pairs, whose mean and standard
    deviation the potentials use. Responses that no pair of the prompt uses yet come first.
    """
    reference = margin_arrays([p for p in base if p.dropped_because != "noise"], config)
    result: list[Pair] = []
    for pair, pool, count in zip(kept, pools, depth, strict=True):
        result.append(pair)
        rest = [p for p in pool if (p.chosen_index, p.rejected_index) != (pair.chosen_index, pair.rejected_index)]
        potential = alignment_potential(*margin_arrays(rest, config), config.weight, reference=reference)
        ranked = [
            dataclasses.replace(p, potential=float(v), kept_because="depth")
            for p, v in zip(rest, potential, strict=True)
            if np.isfinite(v)
        ]
        used = {pair.chosen_index, pair.rejected_index}
        for _ in range(count - 1):
            if not ranked:
                break
            best = max(ranked, key=lambda p: (len({p.chosen_index, p.rejected_index} - used), p.potential or 0.0))
            ranked.remove(best)
            used |= {best.chosen_index, best.rejected_index}
            result.append(best)
    return result
