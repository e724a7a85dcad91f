"""The second reading of the sources of a pool: prompts are rendered and written, part by part.

A part is one file of the pool, and beside it lies a small file of facts: what draws and admissions ask about a prompt
without reading it. Parts are kept in a folder of their own until the pool is whole, so an import that was killed goes on
where it was: a part that has its file is not rendered again. Both files have their hashes beside them. A part of which one
is damaged, or has no hash, is made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.config import PromptsConfig
from selfplay.prompts import rows, survey
from selfplay.prompts.held_out import WORDS, asked, same
from selfplay.prompts.workers import each
from selfplay.storage import seals, tables
from selfplay.types import Message, Prompt, Split

BATCH = 128  # conversations that are rendered at a time
FACT_ROWS = 8192  # in a record batch of facts
SPLITS: tuple[Split, ...] = ("train", "heldout", "audit")
"""A fact has the number of its split."""
FACTS = pa.schema(
    [
        ("prompt_id", pa.int64()),  # the number that its hexadecimal digits are
        ("split", pa.int8()),
        ("same", pa.int64()),  # held_out.same of its messages
        ("ancestor", pa.string()),  # of held-out prompts only
        ("words", WORDS),  # of held-out prompts only
    ]
)
SET_ASIDE = b"set_aside"  # in a file of facts: rows that were left out, by reason

Render = Callable[[Sequence[list[Message]]], Sequence[NDArray[np.int32] | list[int] | str]]
"""Token ids of conversations, or why they have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A part that is written."""

    prompts: Path
    facts: Path
    counts: Counter[str]
    """Prompts of each split."""
    set_aside: Counter[str]


def make(
    chosen: Sequence[survey.Chosen],
    settings: PromptsConfig,
    run_seed: int,
    render: Render,
    work: Path,
    workers: int,
    on_part: survey.OnPart = lambda done, total: None,
) -> list[Made]:
    """Render what was chosen of each part and write it to `work`, in several processes. Finished parts are kept."""
    work.mkdir(parents=True, exist_ok=True)
    write = partial(_write, settings=settings, run_seed=run_seed, work=work)
    found: list[Made] = []
    _rendering.append(render)
    try:
        for made in each(write, list(enumerate(chosen)), workers):
            found.append(made)
            on_part(len(found), len(chosen))
    finally:
        _rendering.pop()
    return found


_rendering: list[Render] = []
"""What renders in this process. Worker processes have it because they are forked; a tokenizer is not sent through a pipe."""


def _write(item: tuple[int, survey.Chosen], *, settings: PromptsConfig, run_seed: int, work: Path) -> Made:
    number, chosen = item
    path, facts_path = work / f"{number:06d}.arrow", work / f"{number:06d}.facts"
    if not (seals.is_whole(facts_path, earlier=False) and seals.is_whole(path, earlier=False)):
        set_aside = Counter[str]()
        prompts, facts = [], []
        for batch in _batches(_conversations(chosen), BATCH):
            kept = list(_rendered(batch, chosen, settings, run_seed, set_aside))
            prompts.append(table_of([prompt for prompt, _ in kept], [ids for _, ids in kept]))
            facts.append(facts_of([prompt for prompt, _ in kept]))
        table = pa.concat_tables([FACTS.empty_table(), *facts])
        rows.write(
            facts_path, table.replace_schema_metadata({SET_ASIDE: json.dumps(set_aside)}), FACT_ROWS, sealed=True
        )
        table = pa.concat_tables([tables.schema(Prompt).empty_table(), *prompts])
        rows.write(path, rows.filled(table), sealed=True)  # last: now it is finished
    splits = [split for batch in rows.columns(facts_path, ["split"]) for split in batch["split"].to_pylist()]
    return Made(
        prompts=path,
        facts=facts_path,
        counts=Counter(SPLITS[split] for split in splits),
        set_aside=Counter(json.loads(rows.metadata(facts_path)[SET_ASIDE])),
    )


@dataclass(frozen=True, slots=True)
class _Conversation:
    prompt_id: str
    messages: list[Message]
    meta: dict[str, Any]
    parent: str | None
    reference: str | None


def _conversations(chosen: survey.Chosen) -> Iterator[_Conversation]:
    """The rows that were chosen."""
    wanted = iter(zip(chosen.rows.tolist(), chosen.ids, strict=True))
    looked_for, own = next(wanted, (-1, ""))
    for number, row in enumerate(chosen.part.rows()):
        if number == looked_for:
            assert isinstance(row, dict), "the survey has read this row"
            found = chosen.part.reading.read(row)
            assert not isinstance(found, str), "the survey has read this row"
            yield _Conversation(own, found.messages, found.meta, found.parent, found.reference)
            looked_for, own = next(wanted, (-1, ""))


def _rendered(
    batch: Sequence[_Conversation],
    chosen: survey.Chosen,
    settings: PromptsConfig,
    run_seed: int,
    set_aside: Counter[str],
) -> Iterator[tuple[Prompt, NDArray[np.int32] | list[int]]]:
    """The prompts of a batch, without their ids, and their ids; those that cannot be rendered or are too long are counted."""
    for row, ids in zip(batch, _rendering[-1]([row.messages for row in batch]), strict=True):
        if isinstance(ids, str):
            set_aside[ids] += 1
        elif len(ids) > settings.max_tokens:
            set_aside["too long"] += 1
        else:
            own, parent = row.prompt_id, row.parent
            root = chosen.roots.get(own, own)
            split = survey.split_of(settings, run_seed, root, chosen.source_of)
            prompt = Prompt(
                prompt_id=own, messages=row.messages, prompt_ids=[], split=split, meta={} if split == "train" else row.meta,
                parent=parent, source=chosen.source, root=None if root in (own, parent) else root,
                reference=row.reference,
            )  # fmt: skip
            yield prompt, ids


def table_of(prompts: Sequence[Prompt], ids: Sequence[NDArray[np.int32] | list[int]]) -> pa.Table:
    """The prompts as a table, with their ids, which never become Python numbers where they are none already."""
    table = tables.to_table(prompts, Prompt)
    lengths = np.array([0, *map(len, ids)], np.int32)
    flat = np.concatenate([np.empty(0, np.int32), *ids]).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(np.cumsum(lengths, dtype=np.int32)), pa.array(flat))
    place = table.schema.get_field_index("prompt_ids")
    return table.set_column(place, table.schema.field(place), column)


def facts_of(prompts: Sequence[Prompt]) -> pa.Table:
    """The facts of some prompts."""
    kept_apart = [p.split != "train" for p in prompts]
    return pa.table(
        {
            "prompt_id": [int(p.prompt_id, 16) for p in prompts],
            "split": [SPLITS.index(p.split) for p in prompts],
            "same": [same(p.messages) for p in prompts],
            "ancestor": [p.ancestor if apart else None for p, apart in zip(prompts, kept_apart, strict=True)],
            "words": [
                asked(p.messages).view(np.int32) if apart else None
                for p, apart in zip(prompts, kept_apart, strict=True)
            ],
        },
        schema=FACTS,
    )


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch
