"""The first reading of the sources of a pool: what each row is, and on which side of the split it belongs.

Of a row no more is kept than the hash of its conversation (8 bytes) and the parent that it names, so a source of a million
rows needs some megabytes. Texts are read again when they are rendered (`parts.py`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reward.kinds import Kind
from selfplay import seeds
from selfplay.config import Config, PromptsConfig
from selfplay.errors import InputError
from selfplay.prompts.files.part import Part
from selfplay.prompts.formats import canonical, hash_of, names
from selfplay.prompts.formats.reading import NO_FORMAT
from selfplay.prompts.formats.report import Recognised, counted, nothing_in
from selfplay.prompts.references import readers, unreadable
from selfplay.prompts.workers import each
from selfplay.types import Split

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
    held_out: bool
    """Whether it is a part of the source of held-out prompts."""


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
    train: Sequence[Part],
    heldout: Sequence[Part],
    workers: int,
    on_part: OnPart = lambda done, total: None,
) -> Survey:
    """Read all rows once, and decide which come into the pool and on which side. Raises InputError for an empty source, and
    for a reference that the reward of the run cannot read.

    A conversation comes once; of equal ones the first counts. What is held out, or descends from the same oldest ancestor
    as a held-out prompt, is not trained on.
    """
    settings, set_aside = config.prompts, Counter[str]()
    seen: list[Seen] = []
    kinds = {held_out: readers(config, held_out=held_out) for held_out in (False, True)}
    looked = [(part, kinds[False]) for part in train] + [(part, kinds[True]) for part in heldout]
    for found in each(_look, looked, workers):
        if found.refused is not None:
            raise InputError(
                f"{settings.source if len(seen) < len(train) else settings.heldout}: {found.refused}",
                "correct the row, or take it out; docs/rewards.md says what each reward reads",
            )
        seen.append(found)
        on_part(len(seen), len(train) + len(heldout))
    ours = _Side(settings.source, train, seen[: len(train)], set_aside)
    apart = _Side(settings.heldout, heldout, seen[len(train) :], set_aside) if settings.heldout is not None else None
    parents = dict(ours.parents)
    if apart is not None:  # a prompt of both has the parent that the held-out file names, or none
        for own in parents.keys() & set(names(apart.hashes)):
            del parents[own]
        parents |= apart.parents
    roots = {own: ancestor(own, parents) for own in parents}
    keep = np.ones(len(ours.hashes), bool)
    if apart is not None:
        keep = ~_leaks(ours, apart, roots)
        set_aside["also held out"] += int((~keep).sum())
    chosen = [*ours.chosen(keep, roots, held_out=False)]
    if apart is not None:
        chosen += apart.chosen(np.ones(len(apart.hashes), bool), roots, held_out=True)
    splits = Counter[str]()
    for part in chosen:
        splits.update(split_of(settings, config.run.seed, part.roots.get(own, own), part.held_out) for own in part.ids)
    require_both_sides(splits, +set_aside)
    recognised = [side.said for side in (ours, apart) if side is not None]
    return Survey(chosen=chosen, splits=splits, set_aside=+set_aside, recognised=recognised)


def _look(item: tuple[Part, Sequence[Kind]]) -> Seen:
    return look(*item)


def look(part: Part, kinds: Sequence[Kind] = ()) -> Seen:
    """What the rows of a part are. `kinds`: the rewards that have to be able to read the references."""
    hashes: list[int] = []
    rows: list[int] = []
    parents: dict[int, str] = {}
    bad = Counter[str]()
    refused: str | None = None
    recognised = Recognised()
    for number, row in enumerate(part.rows()):
        found = row if isinstance(row, str) else part.reading.read(row)
        if isinstance(found, str):
            bad[found] += 1
            if isinstance(row, dict):
                recognised.not_found(row, found)
            continue
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
        if found.parent:
            parents[len(hashes)] = found.parent
        recognised.found(found)
        hashes.append(seeds.derive(text))
        rows.append(number)
    return Seen(
        hashes=np.array(hashes, np.int64), rows=np.array(rows, np.int32), parents=parents, bad=bad, refused=refused,
        recognised=recognised,
    )  # fmt: skip


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


def split_of(settings: PromptsConfig, run_seed: int, root: str, held_out: bool) -> Split:
    """The split of a prompt, which its oldest ancestor decides. `held_out`: it comes from the source of held-out prompts."""
    if settings.heldout is None:
        held_out = seeds.derive(run_seed, "heldout", root) < settings.heldout_fraction * 2**63
    if not held_out:
        return "train"
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

    def chosen(self, keep: NDArray[np.bool_], roots: Mapping[str, str], *, held_out: bool) -> Iterator[Chosen]:
        """The rows to keep of each part. keep: (n,)."""
        start = 0
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            wanted = keep[start:end]
            ids = names(self.hashes[start:end][wanted])
            yield Chosen(
                part=part, rows=self._rows[start:end][wanted], ids=ids, source=self._source, held_out=held_out,
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
