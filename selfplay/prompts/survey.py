"""The first reading of the sources of a pool: what each row is, and on which side of the split it belongs.

Of a row no more is kept than the hash of its conversation (8 bytes) and the parent that it names, so a source of a million
rows needs some megabytes. Texts are read again when they are rendered (`parts.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from reward.kinds import Kind
from selfplay import seeds
from selfplay.config import Config, PromptsConfig
from selfplay.errors import InputError
from selfplay.prompts import benchmarks
from selfplay.prompts.files.part import Part
from selfplay.prompts.formats import Found, Reading, Row, canonical, hash_of, names
from selfplay.prompts.formats.reading import NO_FORMAT
from selfplay.prompts.formats.report import Recognised, counted, nothing_in, prompts_of
from selfplay.prompts.references import readers, unreadable
from selfplay.prompts.workers import each
from selfplay.types import Message, Split

ALSO: dict[Split, str] = {"heldout": "also held out", "audit": "also in the audit set"}
"""Why a prompt is set aside that another source has too."""

AlsoIn = Callable[[Sequence[list[Message]]], Sequence[str | None]]
"""For each conversation the name of a benchmark that has it too, or None (benchmarks.also_in)."""
OnPart = Callable[[int, int], None]
"""Called with how many parts are done, and of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was seen of the rows of a part that have a conversation."""

    hashes: NDArray[np.int64]
    """(n,) of the conversations."""
    rows: NDArray[np.int32]
    """(n,) their places in the part."""
    parents: dict[int, str]
    """The parent that a row names, by its place among the n."""
    bad: Counter[str]
    """Rows without a conversation, or without a reference where the reward needs one, by reason."""
    refused: str | None
    """What is wrong with the first reference that the reward cannot read."""
    recognised: Recognised


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Rows of a part that come into the pool, if the template takes them and they are not too long."""

    part: Part
    rows: NDArray[np.int32]
    """(n,) their places in the part, in ascending order."""
    ids: list[str]
    """(n,) their prompt_ids."""
    roots: dict[str, str]
    """The oldest ancestor of a prompt that names a parent, by prompt_id."""
    source: str
    source_of: Split
    """What the prompts of its source are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    chosen: list[Chosen]
    splits: Counter[str]
    """Prompts of each split, those included that cannot be rendered or are too long."""
    set_aside: Counter[str]
    """Rows that were left out, by reason."""
    recognised: list[str]
    """What each source is, in words."""


def survey(
    config: Config,
    sources: Mapping[Split, Sequence[Part]],
    workers: int,
    on_part: OnPart = lambda done, total: None,
) -> Survey:
    """Read all rows once, and decide which come into the pool and on which side. Raises InputError for an empty source, and
    for a reference that the reward of the run cannot read.

    sources: the parts of the source of each split that has one, in the order train, heldout, audit. A conversation comes
    once; of equal ones the first counts. What is held out, or descends from the same oldest ancestor as a held-out prompt,
    is not trained on; nor is what a benchmark asks. In the same way, what the audit set has is not held out for the gate.
    """
    settings, set_aside = config.prompts, Counter[str]()
    also_in = None
    if settings.benchmarks:
        read = benchmarks.read(settings.benchmarks)
        also_in = partial(benchmarks.also_in, benchmarks=read, ngram=settings.leak_ngram, overlap=settings.leak_overlap)
    kinds = {split: readers(config, held_out=split != "train") for split in sources}
    every = [
        (part, kinds[split], also_in if split == "train" else None)
        for split, parts in sources.items()
        for part in parts
    ]
    seen: list[Seen] = []
    given: dict[Split, str | None] = {"train": settings.source, "heldout": settings.heldout, "audit": settings.audit}
    of_splits = [split for split, parts in sources.items() for _ in parts]
    for split, found in zip(of_splits, each(_look, every, workers), strict=True):
        if found.refused is not None:
            raise InputError(
                f"{given[split]}: {found.refused}",
                "correct the row, or take it out; docs/rewards.md says what each reward reads",
            )
        seen.append(found)
        on_part(len(seen), len(every))
    sides: dict[Split, _Side] = {}
    parents: dict[str, str] = {}
    rest = iter(seen)
    for split, parts in sources.items():
        sides[split] = side = _Side(str(given[split]), parts, list(islice(rest, len(parts))), set_aside)
        if parents:  # a prompt of several sources has the parent that the last of them names, or none
            for own in parents.keys() & set(names(side.hashes)):
                del parents[own]
        parents |= side.parents
    roots = {own: ancestor(own, parents) for own in parents}
    chosen: list[Chosen] = []
    for split, side in sides.items():
        keep = np.ones(len(side.hashes), bool)
        for other in list(sides)[list(sides).index(split) + 1 :]:
            leaks = keep & _leaks(side, sides[other], roots)
            set_aside[ALSO[other]] += int(leaks.sum())
            keep &= ~leaks
        chosen += side.chosen(keep, roots, split)
    splits = Counter[str]()
    for these in chosen:
        roots_of, source_of = these.roots, these.source_of
        splits.update(split_of(settings, config.run.seed, roots_of.get(own, own), source_of) for own in these.ids)
    require_both_sides(splits, +set_aside)
    recognised = [side.said for side in sides.values()]
    return Survey(chosen=chosen, splits=splits, set_aside=+set_aside, recognised=recognised)


def _look(item: tuple[Part, Sequence[Kind], AlsoIn | None]) -> Seen:
    part, kinds, also_in = item
    return look(part.rows(), part.reading, kinds, also_in)


def look(rows_of: Iterable[Row], reading: Reading, kinds: Sequence[Kind] = (), also_in: AlsoIn | None = None) -> Seen:
    """What the rows of a part are. `kinds`: the rewards that have to be able to read the references. `also_in`: names the
    benchmark that has a conversation too; such rows are bad ones."""
    hashes: list[int] = []
    rows: list[int] = []
    parents: list[str | None] = []
    asked: list[Found] = []
    bad = Counter[str]()
    refused: str | None = None
    recognised = Recognised()
    for number, _, found in prompts_of(rows_of, reading, recognised, bad):
        text = canonical(found.messages)
        # Only half of a surrogate pair is no text, and whole pairs are rare as well.
        kept = [found.messages, found.parent, found.reference]
        if (found.parent or found.reference or "\\ud" in text) and (why := why_not_stored(kept)):
            bad[why] += 1
            continue
        if (why := unreadable(found.reference, kinds)) is not None and found.reference is None:
            bad[why] += 1
            continue
        if why is not None:
            refused = refused or f"the prompt {found.messages[-1]['content'][:60]!r}: {why}"
        parents.append(found.parent)
        hashes.append(seeds.derive(text))
        rows.append(number)
        if also_in is not None:
            asked.append(found)
        else:
            recognised.found(found)
    keep = np.arange(len(hashes))
    if also_in is not None:
        public = also_in([found.messages for found in asked])
        bad.update(f"also in {name}" for name in public if name is not None)
        keep = np.array([i for i, name in enumerate(public) if name is None], np.int64)
        for i in keep.tolist():
            recognised.found(asked[i])
    return Seen(
        hashes=np.array(hashes, np.int64)[keep],
        rows=np.array(rows, np.int32)[keep],
        parents={i: own for i, at in enumerate(keep.tolist()) if (own := parents[at]) is not None},
        bad=bad,
        refused=refused,
        recognised=recognised,
    )


def why_not_stored(value: object) -> str | None:
    """Why a value of a row cannot be written to a file: half of a surrogate pair, or what JSON does not know."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except Exception as error:
        return f"cannot be rendered ({type(error).__name__})"
    return None


def ancestor(key: str, parents: Mapping[str, str]) -> str:
    """The oldest prompt that this one was made from, as far as parents are known; itself where it has none."""
    line = [key]
    while (parent := parents.get(line[-1])) is not None:
        if parent in line:
            return min(line[line.index(parent) :])  # a circle has no oldest; all of it ends on one side of the split
        line.append(parent)
    return line[-1]


def split_of(settings: PromptsConfig, run_seed: int, root: str, source_of: Split) -> Split:
    """The split of a prompt, which its oldest ancestor decides as far as its source does not. `source_of`: what that is for."""
    held_out = source_of != "train"
    if settings.heldout is None and not held_out:
        held_out = seeds.derive(run_seed, "heldout", root) < settings.heldout_fraction * 2**63
    if not held_out:
        return "train"
    if settings.audit is not None:
        return "audit" if source_of == "audit" else "heldout"
    return "audit" if seeds.derive(run_seed, "audit", root) < settings.audit_fraction * 2**63 else "heldout"


def require_both_sides(splits: Mapping[str, int], set_aside: Mapping[str, int]) -> None:
    """Raise InputError unless there are prompts to train on and prompts that are held out."""
    for split in ("train", "heldout"):
        if not splits.get(split):
            raise InputError(
                f"no prompt is left for {split} ({dict(set_aside) or 'too few prompts'})",
                "give more prompts, raise prompts.max_tokens, or change prompts.heldout_fraction",
            )


class _Side:
    """All conversations of one source, each once."""

    def __init__(self, source: str, parts: Sequence[Part], seen: Sequence[Seen], set_aside: Counter[str]) -> None:
        """Rows without a conversation, and those that come again, are added to `set_aside`."""
        self._source, self._parts = source, parts
        bad, recognised = Counter[str](), Recognised()
        for found in seen:
            bad.update(found.bad)
            recognised.add(found.recognised)
        set_aside.update(bad)
        every = np.concatenate([np.empty(0, np.int64), *(found.hashes for found in seen)])
        if not len(every):
            raise nothing_in(source, recognised, bad)
        first = np.sort(np.unique(every, return_index=True)[1])
        bad["duplicate"] = len(every) - len(first)
        set_aside["duplicate"] += bad["duplicate"]
        self.said = f"{source}: {recognised.words()}"
        if +bad:
            keys, hint = recognised.why_not()
            self.said += f", {bad.total():,} set aside: {counted(+bad)}" + (
                f"; {keys} ({hint})" if NO_FORMAT in bad else ""
            )
        starts = np.cumsum([0, *(len(found.hashes) for found in seen)])
        self.hashes = every[first]
        """(n,) of the conversations, in the order they came."""
        self._rows = np.concatenate([found.rows for found in seen])[first]
        self._ends = np.searchsorted(first, starts[1:])
        self.parents: dict[str, str] = {}
        """The parent of a prompt that names one, by prompt_id."""
        for start, found in zip(starts.tolist(), seen, strict=False):
            at = np.array(sorted(found.parents), np.int64)
            for place, own in zip(at.tolist(), names(found.hashes[at]), strict=True):
                if _is_in(start + place, first):
                    self.parents[own] = found.parents[place]

    def chosen(self, keep: NDArray[np.bool_], roots: Mapping[str, str], source_of: Split) -> Iterator[Chosen]:
        """The rows to keep of each part. keep: (n,)."""
        start = 0
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            wanted = keep[start:end]
            ids = names(self.hashes[start:end][wanted])
            yield Chosen(
                part=part, rows=self._rows[start:end][wanted], ids=ids, source=self._source, source_of=source_of,
                roots={own: roots[own] for own in ids if own in roots},
            )  # fmt: skip
            start = end


def _is_in(number: int, ascending: NDArray[np.int64]) -> bool:
    at = int(np.searchsorted(ascending, number))
    return at < len(ascending) and bool(ascending[at] == number)


def _leaks(ours: _Side, apart: _Side, roots: Mapping[str, str]) -> NDArray[np.bool_]:
    """(n,) which of our prompts are held out, or have the same oldest ancestor as a held-out prompt."""
    oldest = {roots.get(own, own) for own in names(apart.hashes)}
    leaks: NDArray[np.bool_] = np.isin(ours.hashes, [*apart.hashes.tolist(), *map(hash_of, oldest)])
    related = [hash_of(own) for own in ours.parents if roots.get(own, own) in oldest]
    return leaks | np.isin(ours.hashes, related)
