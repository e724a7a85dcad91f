"""Responses and pairs for the tests of `selfplay.pairs`: as numbers in memory, and as the small files of a round."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfplay.config import PairsConfig
from selfplay.pairs.base import base_pairs
from selfplay.pairs.responses import Response
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Prompt, RankedPair, Reward


class Told:
    """The progress of a stage: what it said last."""

    text, done, total = "", 0, None

    def update(self, **said: Any) -> None:
        vars(self).update(said)


def response(
    reward: float, *, index: int = 0, digest: int | None = None, logp: float = -4.0, **fields: Any
) -> Response:
    """One response of two tokens; its ids are those of no other index, unless `digest` says so."""
    own = 10 + index if digest is None else digest
    return Response(**({"index": index, "reward": reward, "logp": logp, "n_tokens": 2, "digest": own} | fields))


def base(
    responses: Sequence[Response], noise: float = 0.0, name: str = "p", **settings: Any
) -> tuple[list[RankedPair], Counter[str]]:
    """The base pair of one prompt, and why there is none. β is 0.1."""
    return base_pairs([(name, responses)], PairsConfig(**settings), noise, 0.1)


def many(n: int, rng: np.random.Generator) -> list[RankedPair]:
    """Base pairs of n prompts with random margins."""
    made = []
    for i in range(n):
        first = response(float(rng.normal()), index=0, logp=-float(rng.uniform(1, 9)))
        made += base([first, response(float(rng.normal()), index=1)], name=f"p{i}")[0]
    return made


class Files:
    """Prompts, candidates and rewards on disk, as the stages before `pairs` leave them.

    rewards: by prompt_id, those of its candidates. The candidate k of prompt p has the text «p/k», and as many tokens as k
    tells, of ids that no other candidate has.
    """

    def __init__(self, folder: Path, rewards: Mapping[str, Sequence[float | None]]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.prompts, self.candidates, self.scored = (
            folder / f"{n}.parquet" for n in ("prompts", "candidates", "scored")
        )
        self.ids = {(p, k): [100 * i + k, *[7] * k, 2] for i, p in enumerate(rewards) for k in range(len(rewards[p]))}
        self.prompt_ids = {p: [1, i] for i, p in enumerate(rewards)}
        # The file of prompts has another order than that of candidates: rows are found by their prompt_id.
        rows = [
            Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=self.prompt_ids[p], split="train")
            for p in reversed(rewards)
        ]
        tables.write_rows(self.prompts, rows, Prompt)
        self.write_candidates()
        given = [Reward(prompt_id=p, index=k, reward=rewards[p][k]) for p, k in self.ids]
        tables.write_rows(self.scored, given, Reward)

    def write_candidates(self, logps: Mapping[tuple[str, int], float] | None = None, cut: Sequence[Any] = ()) -> None:
        """Write the candidates: their logp is −(3 + index) nats or what is given; those in `cut` hit the token limit."""
        rows = [
            Candidate(
                prompt_id=p, index=k, text=self.text(p, k), token_ids=ids, logp=(logps or {}).get((p, k), -3.0 - k),
                n_tokens=len(ids), finish_reason="length" if (p, k) in cut else "stop", policy=3,
                digest=answers.digest(np.array(ids, np.int32)),
            )
            for (p, k), ids in self.ids.items()
        ]  # fmt: skip
        tables.write_rows(self.candidates, rows, Candidate)

    def grow_old(self) -> None:
        """Write the candidates as versions before the column `digest` did: with token ids of 64 bits."""
        table = pq.read_table(self.candidates).drop_columns(["digest"])
        place = table.column_names.index("token_ids")
        wide = table.schema.set(place, pa.field("token_ids", pa.list_(pa.int64())))
        pq.write_table(table.cast(wide), self.candidates, row_group_size=3)

    @staticmethod
    def text(prompt_id: str, index: int) -> str:
        return f"{prompt_id}/{index}"

    def told(self, pairs: Sequence[Any]) -> bool:
        """Whether texts and ids of whole pairs are those of the candidates that they name."""
        return all(
            (p.chosen, p.rejected) == (self.text(p.prompt_id, p.chosen_index), self.text(p.prompt_id, p.rejected_index))
            and p.prompt_ids == self.prompt_ids[p.prompt_id]
            and p.chosen_ids == self.ids[p.prompt_id, p.chosen_index]
            and p.rejected_ids == self.ids[p.prompt_id, p.rejected_index]
            for p in pairs
        )
