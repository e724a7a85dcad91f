"""Scores on disk, a file for each shard of candidates, as the reward gave them.

A file is named by a hash of what was scored. So scores are found by whoever has the same texts before him, whether their
shard lies in a file of its own or among all candidates of a round, and no other texts ever find them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.errors import GuardError
from selfplay.rewards.scorer import Answer, Scorer
from selfplay.rewards.texts import Item
from selfplay.storage import folders, seals, tables
from selfplay.types import Candidate

Floats = NDArray[np.float64]
REASONS = b"reasons"  # key in the metadata of a file


def contents(candidates: Path, shard_items: int) -> list[str]:
    """A SHA-256 for each shard of `shard_items` candidates of a file: over prompt and text of each, which are what a reward reads.
    (The reference of a prompt never changes in a run.)

    The file is read once. How its rows are grouped makes no difference.
    """
    found = []
    row = 0
    for table in tables.each_group(candidates, ("prompt_id", "text"), row_type=Candidate):
        for prompt_id, text in zip(table["prompt_id"].to_pylist(), table["text"].to_pylist(), strict=True):
            if row % shard_items == 0:
                found.append(hashlib.sha256())
            asked, said = prompt_id.encode(), text.encode()
            found[-1].update(b"%d %d " % (len(asked), len(said)) + asked + said)
            row += 1
    return [hashed.hexdigest() for hashed in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The scored shards of a round, in a folder that belongs to the reward with these identities."""

    folder: Path
    scorer: Scorer
    identities: tuple[str, ...]

    def path(self, content: str) -> Path:
        """The file with the scores of a shard, which is known by its content (`contents`)."""
        return self.folder / f"{content[:32]}.parquet"

    def has(self, content: str) -> bool:
        """Whether a shard is scored. A file that is damaged counts as none, and is deleted."""
        return seals.is_whole(self.path(content))

    def drop(self, content: str) -> None:
        """Delete the file of a shard, whose scores are to be asked for again."""
        for path in (self.path(content), seals.beside(self.path(content))):
            path.unlink(missing_ok=True)

    def ask(self, items: Sequence[Item], on_progress: Callable[[int], None]) -> Answer:
        """Their scores. Raises as `Scorer.ask`, and GuardError where another reward answers."""
        answer = self.scorer.ask(items, on_progress)
        if answer.identities != self.identities:
            raise GuardError(
                f"the model behind the {self.scorer.role} changed during the stage: {answer.identities} instead of "
                f"{self.identities}",
                "see that one and the same model serves, then run the same command again: finished shards are kept",
            )
        return answer

    def keep(self, content: str, answer: Answer) -> None:
        """Write the scores of a shard into its file."""
        scores = pa.table({f"score_{member}": own for member, own in enumerate(answer.scores)})
        folders.make(self.folder)
        tables.write_table(
            self.path(content), scores.replace_schema_metadata({REASONS: json.dumps(answer.reasons).encode()})
        )

    def read(self, content: str) -> tuple[Floats, Counter[str]]:
        """Every member's scores (M, n) of a shard as they came, NaN where there is none, and why there is none."""
        table = tables.read_table(self.path(content), [f"score_{member}" for member in range(len(self.identities))])
        reasons = json.loads(table.schema.metadata[REASONS])
        return np.array([tables.to_array(column) for column in table.columns], np.float64), Counter(reasons)
