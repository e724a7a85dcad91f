"""The rows of a file as an order to add prompts has them: only what counts, whatever the file's format is."""

from __future__ import annotations

from collections import Counter
from typing import Any

from selfplay.prompts.files.part import all_parts
from selfplay.prompts.formats import Found, Reading
from selfplay.prompts.formats.report import Recognised, counted, nothing_in, prompts_of
from selfplay.prompts.survey import why_not_stored


def rows_of(source: str, reading: Reading) -> tuple[list[dict[str, Any]], str]:
    """The rows to add, and in words what the source was recognised as. Raises InputError where it has no prompt."""
    rows: list[dict[str, Any]] = []
    recognised, bad = Recognised(), Counter[str]()
    for part in all_parts(source, reading):
        for _, row, found in prompts_of(part.rows(), reading, recognised, bad):
            added = _row(found) | (
                {"source": str(row["source"])} if isinstance(row, dict) and row.get("source") else {}
            )
            if why := why_not_stored(added):
                bad[why] += 1
            else:
                recognised.found(found)
                rows.append(added)
    if not rows:
        raise nothing_in(source, recognised, bad)
    said = f"; set aside: {counted(bad)}" if bad else ""
    return rows, f"{source}: {recognised.words()}{said}"


def _row(found: Found) -> dict[str, Any]:
    alone = len(found.messages) == 1 and found.messages[0]["role"] == "user"
    row: dict[str, Any] = {"prompt": found.messages[0]["content"]} if alone else {"messages": found.messages}
    return row | {
        name: value for name, value in (("parent", found.parent), ("reference", found.reference)) if value is not None
    }
