"""The reference of a row: the text by which a reward may check an answer.

It is in one of the columns `reference`, `answer`, `solution`, `ground_truth` and `input_output`, in `reward_model.ground_truth`,
or in the columns of a public format that needs several. What is no text becomes JSON with sorted keys, so that the same reference is the same text whatever
file it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reward.kinds import Kind
from selfplay.config import Config, RewardSource

FORMATS = (
    (("instruction_id_list",), ("kwargs",)),  # IFEval
    (("test_list",), ("test_setup_code", "test_imports")),  # MBPP
    (("test", "entry_point"), ()),  # HumanEval
)
"""Columns that are a reference together: those that have to be there, and those that may be."""
NAMES = ("answer", "solution", "ground_truth", "input_output")
INSIDE = ("reward_model", "ground_truth")
"""An object, and its key that is a reference (verl)."""
COLUMNS = ("reference", *(name for needed, others in FORMATS for name in needed + others), *NAMES, INSIDE[0])
"""All columns that may hold a reference."""
_COLUMNS = frozenset(COLUMNS)


def reference_of(row: Mapping[str, Any]) -> str | None:
    """The reference of a row; None where it has none. `reference` comes first, then the formats, then the other names.

    A value that is missing, null or empty is not there. Raises TypeError, ValueError and RecursionError for a value that is
    no JSON.
    """
    if _COLUMNS.isdisjoint(row):  # as most rows are
        return None
    if _is_there(row.get("reference")):
        return _text(row["reference"])
    for needed, others in FORMATS:
        if all(_is_there(row.get(name)) for name in needed):
            return _text({name: row[name] for name in needed + others if _is_there(row.get(name))})
    found = next((row[name] for name in NAMES if _is_there(row.get(name))), None)
    if found is None and isinstance(inner := row.get(INSIDE[0]), Mapping) and _is_there(inner.get(INSIDE[1])):
        found = inner[INSIDE[1]]
    return None if found is None else _text(found)


def readers(config: Config, *, held_out: bool) -> list[Kind]:
    """The rewards of a run that check answers by a reference: those that train, or those that judge at the gate.

    `held_out`: for held-out prompts. Where these are a share of the source, its rows are for both.
    """
    trains, judges = config.reward_sources(), config.judge_sources() or config.reward_sources()
    both = [*trains.values(), *judges.values()] if config.prompts.heldout is None else []
    found = [reader(source) for source in both or (judges if held_out else trains).values()]
    return [kind for kind in found if kind is not None]


def reader(source: RewardSource) -> Kind | None:
    """The settings of a reward that checks answers by a reference; None for any other."""
    served = source.served()
    return served[1] if served is not None and type(served[1]).unreadable is not Kind.unreadable else None


def unreadable(reference: str | None, kinds: Iterable[Kind]) -> str | None:
    """Why the first of the rewards that cannot check an answer by a reference cannot; None where all can."""
    return next((why for kind in kinds if (why := kind.unreadable(reference)) is not None), None)


def which(kinds: Sequence[Kind]) -> list[dict[str, Any]]:
    """What decides on what the rewards can read."""
    return [{"kind": type(kind).__qualname__, **kind.which()} for kind in kinds]


def _is_there(value: Any) -> bool:
    return value is not None and value not in ("", [], {})


def _text(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else json.dumps(_without_nulls(value), ensure_ascii=False, sort_keys=True, default=str)
    )


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null: a Parquet file has all keys in all rows, null where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
