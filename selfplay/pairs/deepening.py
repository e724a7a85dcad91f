"""The stage `depth`: further pairs for the kept prompts (BPO, Wang et al., 2025, arXiv 2411.10914)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfplay.config import DepthConfig, PairsConfig
from selfplay.methods.depth import allocate, temperature
from selfplay.methods.potential import alignment_potential
from selfplay.pairs.base import UNFIT, every_pair, finite, implicit_reward
from selfplay.pairs.responses import Responses
from selfplay.pairs.selection import margin_arrays
from selfplay.pairs.stage import REFERENCE
from selfplay.pairs.writing import read_ranked, write_pairs
from selfplay.progress import Line
from selfplay.stage import Metrics, Stage, samples
from selfplay.storage import tables
from selfplay.types import RankedPair

DEPTH = Stage(
    name="depth",
    reads=(
        "prompts/prompts.parquet",
        "generate/candidates.parquet",
        "score/scored.parquet",
        "pairs/pairs.parquet",
    ),
    writes=("pairs.parquet",),
    log="trainer",
    space=samples,
)
TOGETHER = 256  # prompts whose pairs are ranked in one call

Pool = tuple[RankedPair, list[RankedPair]]  # a kept base pair, and every pair that its prompt can give


def depth(
    out: Path,
    line: Line,
    *,
    prompts: Path,
    candidates: Path,
    scored: Path,
    pairs: Path,
    gradients: Callable[[Path, int], Metrics],
    settings: DepthConfig,
    ranking: PairsConfig,
    noise: float,
    beta: float,
) -> Metrics:
    """Write the pairs to train on: the kept base pairs, each followed by what was added to its prompt.

    gradients: writes the gradient features of so many kept base pairs, with their clusters, to a file, and gives metrics of
    them; it is asked only for `depth.method: gradient`. ranking: how pairs are ranked. noise, beta: as for base pairs.
    """
    base = read_ranked(pairs)
    kept = [pair for pair in base if pair.kept_because]
    responses = Responses.read(candidates, scored, _if_there(pairs.with_name(REFERENCE)))
    found: Metrics = {}
    deepened = kept
    if settings.method == "gradient":
        path = out / "gradients.parquet"
        found = gradients(path, len(kept))
        kept = with_gradients(kept, path)
    if settings.method != "none":
        implicit = implicit_reward(ranking.implicit, beta)
        place = {prompt_id: i for i, prompt_id in enumerate(responses.candidates.prompt_ids)}
        starts = responses.candidates.starts.tolist()

        def pools() -> Iterator[Pool]:
            for pair in kept:
                at = place[pair.prompt_id]
                said = responses.of(starts[at], starts[at + 1])
                yield pair, every_pair(pair, said, ranking, noise, implicit)

        sizes = [len(pool) for _, pool in pools()]  # the pools themselves are made again: all of them are too many
        counts = shares(kept, sizes, settings)
        reference = margin_arrays([pair for pair in base if pair.dropped_because not in UNFIT], ranking.signed)
        deepened = list(deepen(pools(), counts, reference, ranking))
        found["most"] = int(counts.max())
    write_pairs(out / "pairs.parquet", deepened, prompts, candidates, responses.candidates)
    line.update(text=f"{len(deepened)} pairs to train on")
    return {"pairs": len(deepened), "added": len(deepened) - len(kept), **found}


def with_gradients(kept: Sequence[RankedPair], gradients: Path) -> list[RankedPair]:
    """The kept base pairs with the cluster and closeness of their gradients, which lie in the file in the same order."""
    rows = list(tables.read_columns(gradients, ("prompt_id", "cluster", "closeness")))
    assert [pair.prompt_id for pair in kept] == [row[0] for row in rows], "these are the gradients of other pairs"
    return [
        dataclasses.replace(pair, cluster=cluster, closeness=closeness)
        for pair, (_, cluster, closeness) in zip(kept, rows, strict=True)
    ]


def shares(kept: Sequence[RankedPair], sizes: Sequence[int], settings: DepthConfig) -> NDArray[np.int64]:
    """Pairs of each kept prompt, (n,), the base pair included. sizes (n,): how many each can give.

    «uniform»: the same for all. «gradient»: by the closeness of the base pair; a prompt whose base pair has none gets no
    further one.
    """
    budget = round(settings.pairs_per_prompt * len(kept))
    if settings.method == "uniform":
        return allocate(np.zeros(len(kept)), sizes, budget, 0.0)
    closeness = np.array([finite(pair.closeness) for pair in kept], np.float64)
    room = [1 if pair.closeness is None else size for pair, size in zip(kept, sizes, strict=True)]
    return allocate(closeness, room, budget, temperature(closeness))


def deepen(
    pools: Iterator[Pool],
    counts: Sequence[int] | NDArray[np.int64],
    reference: tuple[NDArray[np.float64], NDArray[np.float64]],
    ranking: PairsConfig,
) -> Iterator[RankedPair]:
    """The kept base pairs, each followed by the pairs added to its prompt, the best alignment potential first.

    counts (n,): pairs of each prompt, the base pair included. reference: margins of the round's base pairs, whose mean and
    standard deviation the potentials use. Responses that no pair of the prompt uses yet come first.
    """
    batch: list[Pool] = []
    left = [int(count) for count in counts]
    for pool in pools:
        batch.append(pool)
        if len(batch) == TOGETHER:
            yield from _deepen(batch, left[:TOGETHER], reference, ranking)
            batch, left = [], left[TOGETHER:]
    yield from _deepen(batch, left, reference, ranking)


def _deepen(
    pools: Sequence[Pool],
    counts: Sequence[int],
    reference: tuple[NDArray[np.float64], NDArray[np.float64]],
    ranking: PairsConfig,
) -> Iterator[RankedPair]:
    others = [
        [p for p in pool if (p.chosen_index, p.rejected_index) != (base.chosen_index, base.rejected_index)]
        for base, pool in pools
    ]
    explicit, implicit = margin_arrays([pair for group in others for pair in group], ranking.signed)
    potentials = iter(alignment_potential(explicit, implicit, ranking.weight, reference=reference).tolist())
    for (base, _), group, count in zip(pools, others, counts, strict=True):
        yield base
        ranked = [(pair, potential) for pair, potential in zip(group, potentials, strict=False)]
        ranked = [(pair, potential) for pair, potential in ranked if np.isfinite(potential)]
        used = {base.chosen_index, base.rejected_index}
        for _ in range(min(count - 1, len(ranked))):
            best = max(ranked, key=lambda r: (len({r[0].chosen_index, r[0].rejected_index} - used), r[1]))
            ranked.remove(best)
            used |= {best[0].chosen_index, best[0].rejected_index}
            yield dataclasses.replace(
                best[0], potential=best[1], cluster=base.cluster, closeness=base.closeness, kept_because="depth"
            )


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None
