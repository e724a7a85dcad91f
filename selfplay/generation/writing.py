"""Answers of the engine on their way to a file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfplay.processes.protocol import Event
from selfplay.storage import answers, folders, tables
from selfplay.types import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    text: str
    token_ids: NDArray[np.int32]  # (T,)
    logp: float  # nats, summed
    finish_reason: str
    thinking: int | None  # tokens of thoughts; None where nobody looks for any


def write(order: Event, names: list[str], began: float, done: list[list[Answer]]) -> dict[str, Any]:
    """Write the answers of an order to its file: `done` has those to each of the prompts `names`."""
    said, out = [answer for of_prompt in done for answer in of_prompt], Path(order["out"])
    rows = answers.table(
        prompt_ids=names,
        per_prompt=order["sampling"]["n"],
        texts=[answer.text for answer in said],
        token_ids=[answer.token_ids for answer in said],
        logps=[answer.logp for answer in said],
        finish_reasons=[answer.finish_reason for answer in said],
        policy=order["policy"],
        thinking=[answer.thinking for answer in said],
    )
    with folders.disk_errors(out), tables.writing_to(out, Candidate) as file:
        file.table(rows)
    tokens = sum(len(answer.token_ids) for answer in said)
    return {"rows": rows.num_rows, "tokens": tokens, "seconds": time.monotonic() - began}
