"""The candidates of a round without their texts and token ids: the numbers that guard, pairs and depth decide by.

A round of 64k prompts × 8 has half a million candidates. Their texts and ids are more than a gigabyte and stay on disk;
their numbers are 20 MB and are read here, whole, as NumPy arrays.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.errors import CheckpointError
from selfplay.storage import answers, tables
from selfplay.types import EXTERNAL, Candidate

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateColumns:
    """N candidates of P prompts; the candidates of a prompt follow each other."""

    prompt_ids: list[str]  # (P,), in the order of the candidates
    starts: NDArray[np.int64]  # (P + 1,): candidates of prompt p are the rows starts[p] … starts[p + 1] − 1
    index: NDArray[np.int64]  # (N,), 0 … K−1 within the prompt
    logp: Floats  # (N,), nats, summed over the response
    n_tokens: NDArray[np.int64]  # (N,)
    whole: NDArray[np.bool_]  # (N,): the response ended by itself, not at the token limit
    digest: NDArray[np.int64]  # (N,): equal for equal token ids

    @property
    def prompt(self) -> NDArray[np.int64]:
        """(N,): the place of each candidate's prompt in `prompt_ids`."""
        return np.repeat(np.arange(len(self.prompt_ids)), np.diff(self.starts))


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardColumns:
    """The rewards of the same N candidates, in the same order."""

    reward: Floats  # (N,), NaN where there is none
    parts: dict[str, Floats]  # by name (N,), NaN where a candidate has no such part

    @property
    def external(self) -> Floats:
        """(N,): what the reward gave before shaping, which may hide that something is wrong."""
        shaped = self.parts.get(EXTERNAL)
        return self.reward if shaped is None else np.where(np.isnan(shaped), self.reward, shaped)


def read_candidates(path: Path) -> CandidateColumns:
    """The numbers of all candidates in a file."""
    table = tables.read_table(
        path, ("prompt_id", "index", "logp", "n_tokens", "finish_reason", "digest"), row_type=Candidate
    )
    names = table["prompt_id"].combine_chunks().dictionary_encode()
    codes = tables.to_array(names.indices)
    changes = np.flatnonzero(np.diff(codes)) + 1
    starts = np.concatenate([[0], changes, [len(codes)]]) if len(codes) else np.zeros(1, np.int64)
    order = codes[starts[:-1]] if len(codes) else codes
    if len(np.unique(order)) != len(order):
        raise CheckpointError(f"{path}: the candidates of a prompt do not follow each other")
    known = names.dictionary.to_pylist()
    return CandidateColumns(
        prompt_ids=[known[code] for code in order],
        starts=starts.astype(np.int64),
        index=tables.to_array(table["index"]),
        logp=tables.to_array(table["logp"]),
        n_tokens=tables.to_array(table["n_tokens"]),
        whole=_equal(table["finish_reason"], "stop"),
        digest=answers.digests(path) if table["digest"].null_count else tables.to_array(table["digest"]),
    )


def read_rewards(path: Path, candidates: CandidateColumns) -> RewardColumns:
    """The rewards in a file, which has to be of these candidates. Raises CheckpointError where it is of others."""
    table = tables.read_table(path, ("prompt_id", "index", "reward", "reward_parts"))
    same = len(candidates.index) == table.num_rows and np.array_equal(tables.to_array(table["index"]), candidates.index)
    if not same or _runs(table["prompt_id"]) != candidates.prompt_ids:
        raise CheckpointError(f"{path} has the rewards of other candidates", "delete the stage to have it done again")
    return _columns(table)


def read_external(path: Path) -> Floats:
    """The rewards in a file before shaping, (N,), whichever candidates they are of."""
    table = tables.read_table(path, ("reward", "reward_parts"))
    return _columns(table).external


def _columns(table: pa.Table) -> RewardColumns:
    parts: dict[str, Floats] = {}
    for row, text in enumerate(table["reward_parts"].to_pylist()):
        if text != "{}":
            for name, value in json.loads(text).items():
                if name not in parts:
                    parts[name] = np.full(table.num_rows, math.nan)
                parts[name][row] = value
    return RewardColumns(reward=tables.to_array(table["reward"]).astype(np.float64), parts=parts)


def first_of_equals(candidates: CandidateColumns, among: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(N,): the candidates among those of a mask (N,) before which none of the same prompt has the same token ids."""
    rows = np.flatnonzero(among)
    keys = np.stack([candidates.prompt[rows], candidates.digest[rows]])
    found = np.zeros(len(among), np.bool_)
    found[rows[np.unique(keys, axis=1, return_index=True)[1]]] = True
    return found


def _runs(column: pa.ChunkedArray) -> list[str]:
    """The values of a column, equal neighbours once."""
    names = column.combine_chunks().dictionary_encode()
    codes = tables.to_array(names.indices)
    known = names.dictionary.to_pylist()
    return [known[code] for code in codes[np.flatnonzero(np.diff(codes, prepend=-1))]]


def _equal(column: pa.ChunkedArray, value: str) -> NDArray[np.bool_]:
    names = column.combine_chunks().dictionary_encode()
    return np.isin(
        tables.to_array(names.indices), [i for i, v in enumerate(names.dictionary.to_pylist()) if v == value]
    )
