"""Pairs as the trainer takes them: token ids, as they are, never truncated."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def check_pairs(dataset: Any, max_length: int | None = None) -> None:
    """Raise ValueError unless `dataset` is a non-empty Dataset of token ids, none longer than `max_length`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"the dataset must be a datasets.Dataset of known lengths, got {type(dataset).__name__}")
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}: it must hold token ids, not text")
    if len(dataset) == 0:
        raise ValueError("the dataset has no pairs: there is nothing to train on")
    table: pa.Table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[:]
    lengths = {name: pc.list_value_length(table[name]).combine_chunks().fill_null(0) for name in COLUMNS}
    for name, n in lengths.items():
        if (shortest := pc.min(n).as_py()) == 0:
            raise ValueError(f"row {pc.index(n, shortest).as_py()} has no {name}: drop the pair")
    if max_length is not None:
        for name in COLUMNS[1:]:
            total = pc.add(lengths["prompt_ids"], lengths[name])
            if (longest := pc.max(total).as_py()) > max_length:
                raise ValueError(
                    f"row {pc.index(total, longest).as_py()}: prompt_ids and {name} have {longest} tokens, more than "
                    f"max_length {max_length}; raise it or drop the pair: training never truncates"
                )


def largest_id(dataset: Dataset) -> int:
    """The largest token id in a checked dataset."""
    table: pa.Table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[:]
    return max(int(pc.max(pc.list_flatten(table[name])).as_py()) for name in COLUMNS)
