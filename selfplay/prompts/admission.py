"""What a prompt must be to join the pool of a run that has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from reward.kinds import Kind
from selfplay.prompts.benchmarks import Benchmarks, also_in
from selfplay.prompts.formats import DEFAULT, prompt_id
from selfplay.prompts.held_out import HeldOut, same
from selfplay.prompts.parts import Render
from selfplay.prompts.references import unreadable
from selfplay.prompts.survey import why_not_stored
from selfplay.types import Prompt


class Pool(Protocol):
    """What is asked of the pool (`prompts.pool.Pool`)."""

    def has_same(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]: ...

    def ancestors(self, prompt_ids: Iterable[str]) -> dict[str, str]: ...

    def held_out(self) -> HeldOut: ...


def admit(
    rows: Sequence[Mapping[str, Any]],
    pool: Pool,
    render: Render,
    *,
    max_tokens: int,
    ngram: int,
    overlap: float,
    source: str,
    joined: int,
    benchmarks: Benchmarks,
    kinds: Sequence[Kind] = (),
) -> list[Prompt | str]:
    """For each row the prompt that may join the pool, or why it may not.

    rows: of any known format, with "parent" (a prompt_id), "source" and a reference where they have them; `source` is for
    the others. max_tokens: longest rendered prompt. ngram, overlap: see HeldOut. joined: first round that may draw them.
    kinds: the rewards that have to be able to check answers by the reference.
    Refused are rows without a conversation, what the reward cannot check, what the pool has already (the same words), what
    meets a held-out prompt or has its ancestor, what meets a prompt of one of the `benchmarks`, what the chat template
    refuses, and what is too long. Nothing is written.
    """
    roots = pool.ancestors(str(row["parent"]) for row in rows if row.get("parent") is not None)
    found: list[Prompt | str] = [_draft(row, roots, source, joined, kinds) for row in rows]
    drafts = {i: draft for i, draft in enumerate(found) if isinstance(draft, Prompt)}
    if not drafts:
        return found
    meets = pool.held_out().meets(list(drafts.values()), ngram, overlap)
    public = also_in([draft.messages for draft in drafts.values()], benchmarks, ngram, overlap)
    sameness = [same(draft.messages) for draft in drafts.values()]
    known = pool.has_same(np.array(sameness, np.int64))
    said = set[int]()
    for i, met, name, number, there in zip(list(drafts), meets, public, sameness, known.tolist(), strict=True):
        if met or name or there or number in said:
            found[i] = "held out" if met else f"also in {name}" if name else "duplicate"
            del drafts[i]
        else:
            said.add(number)
    rendered = render([draft.messages for draft in drafts.values()]) if drafts else []
    for (i, draft), ids in zip(drafts.items(), rendered, strict=True):
        if isinstance(ids, str):
            found[i] = ids
        elif len(ids) > max_tokens:
            found[i] = "too long"
        else:
            found[i] = dataclasses.replace(draft, prompt_ids=list(map(int, ids)))
    return found


def _draft(
    row: Mapping[str, Any], roots: Mapping[str, str], source: str, joined: int, kinds: Sequence[Kind]
) -> Prompt | str:
    """The prompt of a row before it is rendered, or why it has none."""
    found = DEFAULT.read(row)
    if isinstance(found, str):
        return found
    messages, parent, reference = found.messages, found.parent, found.reference
    origin = str(row.get("source") or source)
    if why_not_stored([messages, parent, origin, reference]):
        return "half a surrogate pair"
    if (why := unreadable(reference, kinds)) is not None:
        return why
    root = roots.get(parent, parent) if parent is not None else None
    return Prompt(
        prompt_id=prompt_id(messages), messages=messages, prompt_ids=[], split="train", parent=parent,
        source=origin, root=None if root == parent else root, joined=joined, reference=reference,
    )  # fmt: skip
