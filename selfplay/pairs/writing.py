"""Whole pairs on disk: the numbers that were decided, joined with the texts and token ids of prompts and candidates.

Texts and ids go from file to file in Arrow, some hundred pairs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from selfplay.storage import tables
from selfplay.storage.candidates import CandidateColumns
from selfplay.types import Candidate, Pair, Prompt, RankedPair


def write_pairs(
    path: Path, pairs: Sequence[RankedPair], prompts: Path, candidates: Path, columns: CandidateColumns
) -> None:
    """Write the pairs, in their order, whole or not at all.

    prompts, candidates: the files that the pairs were made from; columns: the numbers of the same candidates.
    """
    place = {prompt_id: i for i, prompt_id in enumerate(columns.prompt_ids)}
    row_of = {prompt_id: row for row, prompt_id in enumerate(tables.read_column(prompts, "prompt_id"))}
    with (
        tables.writing(path, Pair) as file,
        tables.RowReader(prompts, ("prompt_ids",), Prompt) as of_prompts,
        tables.RowReader(candidates, ("prompt_id", "index", "text", "token_ids"), Candidate) as of_candidates,
    ):
        for start in range(0, len(pairs), tables.GROUP_ROWS):
            part = pairs[start : start + tables.GROUP_ROWS]
            first = [int(columns.starts[place[pair.prompt_id]]) for pair in part]
            rows = [f + pair.chosen_index for f, pair in zip(first, part, strict=True)]
            rows += [f + pair.rejected_index for f, pair in zip(first, part, strict=True)]
            both = of_candidates.take(rows)
            assert both["index"].to_pylist() == [p.chosen_index for p in part] + [p.rejected_index for p in part]
            chosen, rejected = both.slice(0, len(part)), both.slice(len(part))
            table = tables.to_table(part, RankedPair)
            for name, column in (
                ("prompt_ids", of_prompts.take([row_of[pair.prompt_id] for pair in part])["prompt_ids"]),
                ("chosen", chosen["text"]),
                ("rejected", rejected["text"]),
                ("chosen_ids", chosen["token_ids"]),
                ("rejected_ids", rejected["token_ids"]),
            ):
                table = table.append_column(pa.field(name, column.type), column)
            file.table(table)


def read_ranked(path: Path) -> list[RankedPair]:
    """The pairs of a file, without their texts and token ids."""
    names = tables.schema(RankedPair).names
    return [
        pair
        for table in tables.each_group(path, names, row_type=RankedPair)
        for pair in tables.records(table, RankedPair)
    ]
