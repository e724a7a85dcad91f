"""The candidates' log-probabilities under another policy, where implicit rewards need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from selfplay.generation.generator import Generator
from selfplay.progress import Line
from selfplay.storage import tables
from selfplay.types import Candidate, ReferenceLogp


def reference_logps(
    path: Path,
    line: Line,
    *,
    generator: Generator | None,
    prompts: Path,
    candidates: Path,
    shards: Path,
    shard_prompts: int,
    breathe: Callable[[str], None],
) -> None:
    """Write the log-probability of each candidate (nats, summed) under the policy in the engine.

    The engine scores them, not the trainer: both sides of the log-ratio then have its arithmetic. Finished shards are not
    scored again. generator: None where the reference is the policy that sampled, which has scored them already.
    """
    keys = tables.read_table(candidates, ("prompt_id", "index", "logp"), row_type=Candidate)
    if generator is None:
        line.update(text="the reference samples this round: implicit margins are 0")
        logps = tables.to_array(keys["logp"])
    else:
        per_prompt = keys.num_rows // tables.count_rows(prompts)
        rows = shard_prompts * per_prompt
        shards.mkdir(parents=True, exist_ok=True)
        found = []
        line.update(total=keys.num_rows)
        for start in range(0, keys.num_rows, rows):
            shard, count = shards / f"{start:08d}.parquet", min(rows, keys.num_rows - start)
            if not shard.exists():
                breathe("shard")
                values = generator.answer_logps(
                    prompts,
                    candidates,
                    start,
                    count,
                    per_prompt,
                    lambda done, start=start: line.update(done=start + done),  # type: ignore[misc]
                )
                tables.write_table(shard, pa.table({"logp": values}))
            found.append(tables.read_array(shard, "logp"))
            line.update(done=start + count)
        logps = np.concatenate(found)
    with tables.writing(path, ReferenceLogp) as file:
        file.table(keys.set_column(keys.column_names.index("logp"), "logp", pa.array(logps)))
