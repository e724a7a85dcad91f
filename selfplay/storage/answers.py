"""Answers on disk: files of `Candidate` rows, prompt by prompt. Their token ids stay in Arrow and NumPy."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.errors import InputError
from selfplay.storage import tables
from selfplay.types import Candidate, Prompt

IDS = np.dtype("<i4")  # a token id on disk, and in what a digest is computed from


def digest(token_ids: NDArray[np.int32]) -> int:
    """A 63-bit hash of token ids (T,). Equal answers of a prompt are found by it, without reading their ids."""
    hashed = hashlib.blake2b(np.ascontiguousarray(token_ids, IDS).tobytes(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


def digests(path: Path) -> NDArray[np.int64]:
    """The digest of every answer of a file (N,). Where an older file has none, they are computed from its token ids."""
    groups = tables.each_group(path, ["digest"], row_type=Candidate)
    if all(table["digest"].null_count == 0 for table in groups):
        return tables.read_array(path, "digest") if tables.count_rows(path) else np.zeros(0, np.int64)
    found = [_digests(table["token_ids"]) for table in tables.each_group(path, ["token_ids"], row_type=Candidate)]
    return np.concatenate(found)


def join(files: Sequence[Path], out: Path) -> None:
    """Write the answers of several files, in order, to one: a row group at a time."""
    with tables.writing(out, Candidate) as joined:
        for file in files:
            for rows in tables.each_group(file, row_type=Candidate):
                joined.table(rows)


def each_ids(column: pa.ChunkedArray) -> Iterator[NDArray[np.int32]]:
    """The token ids (T,) of each row of a column of lists, as views of its memory."""
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
        for low, high in itertools.pairwise(offsets):
            yield values[low:high]


def flat_ids(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The token ids of all rows of a column of lists, one row after the other (T,), and where each row begins, with the end of
    the last (M + 1,)."""
    rows: pa.ListArray = column.combine_chunks()
    ends = np.cumsum(np.diff(tables.to_array(rows.offsets)), dtype=np.int64)
    return tables.to_array(rows.flatten()), np.concatenate([[0], ends])


def ids_column(rows: Sequence[NDArray[np.int32]]) -> pa.ListArray:
    """A column of lists of token ids, from the ids (T,) of each row."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(ids) for ids in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def table(
    *,
    prompt_ids: Sequence[str],
    per_prompt: int,
    texts: Sequence[str],
    token_ids: Sequence[NDArray[np.int32]],
    logps: Sequence[float],
    finish_reasons: Sequence[str],
    policy: int,
    thinking: Sequence[int | None] | None = None,
) -> pa.Table:
    """A table of `Candidate` rows: the first `per_prompt` answers belong to the first prompt, and so on.

    `prompt_ids` (P,) are the prompts' `prompt_id`; the others have P × `per_prompt` items. `logps` are in nats, summed over
    the tokens of an answer; `policy` is the version that sampled them; `thinking` counts tokens of thoughts, where somebody
    looked for any.
    """
    count = len(prompt_ids) * per_prompt
    assert count == len(texts) == len(token_ids) == len(logps) == len(finish_reasons)
    return pa.table(
        {
            "prompt_id": pa.array(prompt_ids, pa.string()).take(pa.array(np.arange(count) // per_prompt)),
            "index": np.arange(count) % per_prompt,
            "text": pa.array(texts, pa.string()),
            "token_ids": ids_column(token_ids),
            "logp": np.asarray(logps, np.float64),
            "n_tokens": np.array([len(ids) for ids in token_ids], np.int64),
            "finish_reason": pa.array(finish_reasons, pa.string()),
            "policy": np.full(count, policy, np.int64),
            "digest": np.array([digest(ids) for ids in token_ids], np.int64),
            "thinking": pa.array([None] * count if thinking is None else thinking, pa.int64()),
        },
        schema=tables.schema(Candidate),
    )


def continuation(prompt_id: str, token_ids: list[int]) -> Candidate:
    """Given tokens as an answer, to be scored behind a prompt. Nobody has sampled them."""
    return Candidate(
        prompt_id=prompt_id, index=0, text="", token_ids=token_ids, logp=0.0, n_tokens=len(token_ids),
        finish_reason="stop", policy=0, digest=digest(np.array(token_ids, np.int32)),
    )  # fmt: skip


def each_prompt(path: Path, start: int, count: int) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """`prompt_id` and rendered ids (T,) of the prompts start … start + count − 1 of a file of `Prompt` rows."""
    for rows in tables.each_group(path, ["prompt_id", "prompt_ids"], row_type=Prompt, start=start, count=count):
        yield from zip(rows["prompt_id"].to_pylist(), each_ids(rows["prompt_ids"]), strict=True)


def with_prompts(
    prompts: Path, answers: Path, *, start: int, count: int, per_prompt: int
) -> Iterator[list[tuple[NDArray[np.int32], int]]]:
    """The answers start … start + count − 1 behind their prompts: token ids (T,) and the place where the answer begins.

    The first `per_prompt` answers of the file belong to the first prompt, and so on. What is yielded belongs to one row group
    of `answers`. Raises InputError where the two files do not agree.
    """
    end = start + count
    for rows in tables.each_group(answers, ["prompt_id", "token_ids"], row_type=Candidate, start=start, count=count):
        first, last = start // per_prompt, (start + rows.num_rows - 1) // per_prompt
        asked = list(each_prompt(prompts, first, last - first + 1))
        found = []
        for prompt_id, ids in zip(rows["prompt_id"].to_pylist(), each_ids(rows["token_ids"]), strict=True):
            place = start // per_prompt - first
            if place >= len(asked) or asked[place][0] != prompt_id:
                raise InputError(f"row {start} of {answers} is no answer to prompt {start // per_prompt} of {prompts}")
            prompt = asked[place][1]
            found.append((np.concatenate([prompt, ids]), len(prompt)))
            start += 1
        yield found
    if start != end:
        raise InputError(f"{answers} ends at row {start}; {end} were asked for")


def _digests(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.array([digest(ids) for ids in each_ids(column)], np.int64)
