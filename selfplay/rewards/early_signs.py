"""What the answers of a round show before anything is trained on them, and which setting changes it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from selfplay.methods import answer_signs
from selfplay.stage import Metrics
from selfplay.storage import answers, tables
from selfplay.storage.candidates import CandidateColumns, RewardColumns, first_of_equals
from selfplay.types import Candidate

NAMES = ("cut_off", "length_gap", "decided_by_length", "duplicates", "repetition")
NGRAM = 4
BLOCKS = 16  # row groups whose token ids are read for the n-grams: some thousand answers tell a share to a percent


def early_signs(path: Path, columns: CandidateColumns, rewards: RewardColumns, cut_off: str) -> Metrics:
    """The signs by their names in the configuration. path: the file of the candidates. cut_off: `pairs.cut_off`.

    Pairs are those that the stage `pairs` will make of the rewards as they are trained on, after shaping.
    """
    everything = np.ones(len(columns.index), np.bool_)
    different = first_of_equals(columns, everything)
    can_lose = different & (columns.n_tokens > 0) & (columns.whole | (cut_off == "reject"))
    chosen, rejected = answer_signs.base_pairs(rewards.reward, can_lose & columns.whole, can_lose, columns.starts)
    lengths = columns.n_tokens[chosen], columns.n_tokens[rejected]
    return {
        "cut_off": float(1 - columns.whole.mean()) if len(everything) else math.nan,
        "length_gap": answer_signs.length_gap(*lengths),
        "decided_by_length": answer_signs.decided_by_length(*lengths),
        "duplicates": float(1 - different.mean()) if len(everything) else math.nan,
        "repetition": answer_signs.repeated(*_token_ids(path, len(everything)), NGRAM),
    }


def advice(name: str, value: float, cut_off: str) -> str:
    """Which setting to change where a sign is above its limit; empty for a sign of the reward. cut_off: `pairs.cut_off`."""
    which = "shorter" if value < 0 else "longer"
    cut = "; where most rejected answers were cut off, raise generate.max_tokens or set pairs.cut_off: drop"
    return {
        "cut_off": "raise generate.max_tokens"
        + (
            ", or set pairs.cut_off: drop; with reject they lose to every answer that ended, which teaches to be short"
            if cut_off == "reject"
            else "; pairs.cut_off: drop leaves them out of every pair"
        ),
        "length_gap": f"chosen answers are the {which} ones: set reward.shaping.length_control"
        + (", and reward.shaping.repetition_beyond_length with a repetition_penalty" if value < 0 else "")
        + (cut if cut_off == "reject" and value < 0 else ""),
        "decided_by_length": f"the {which} answer wins nearly always: set reward.shaping.length_control, or lower pairs.keep to "
        "train on the pairs of highest potential alone" + (cut if cut_off == "reject" and value < 0 else ""),
        "duplicates": "raise generate.temperature, or sample fewer generate.candidates; fewer prompts give a pair, so raise "
        "pairs.keep to train on as many",
        "repetition": "set reward.shaping.repetition_penalty; in answers that were cut off loops are usual, so lower "
        "generate.max_tokens where they never end",
    }.get(name, "")


def _token_ids(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (T,) and starts (M + 1,) of some answers of a file, in blocks that are spread over it."""
    parts, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    blocks = math.ceil(count / tables.GROUP_ROWS)
    for block in sorted({blocks * i // BLOCKS for i in range(BLOCKS)} if count else ()):
        start = block * tables.GROUP_ROWS
        for table in tables.each_group(path, ["token_ids"], row_type=Candidate, start=start, count=tables.GROUP_ROWS):
            ids, starts = answers.flat_ids(table["token_ids"])
            parts.append(ids)
            lengths.append(np.diff(starts))
    return np.concatenate(parts), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
