"""The name of a conversation: a hash of its messages."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from selfplay import seeds
from selfplay.types import Message

_DIGITS = frozenset("0123456789abcdef")
_encode = json.JSONEncoder(sort_keys=True).encode  # `json.dumps` makes an encoder for each call


def canonical(messages: list[Message]) -> str:
    """The text whose hash names a conversation; what is not ASCII is escaped."""
    return _encode(messages)


def prompt_id(messages: list[Message]) -> str:
    """Sixteen hexadecimal digits: the hash of a conversation, a number below 2^63."""
    return f"{seeds.derive(canonical(messages)):016x}"


def hash_of(prompt_id: str) -> int:
    """The number that a prompt_id is; −1 for a text that is none."""
    digits = len(prompt_id) == 16 and set(prompt_id) <= _DIGITS
    return int(prompt_id, 16) if digits and prompt_id < "8" else -1


def hashes_of(prompt_ids: Sequence[str]) -> NDArray[np.int64]:
    """`hash_of` (n,) of each."""
    text = "".join(prompt_ids)
    if set(map(len, prompt_ids)) <= {16} and set(text) <= _DIGITS:  # all of them at once
        return np.maximum(np.frombuffer(bytes.fromhex(text), ">i8").astype(np.int64), -1)
    return np.array([hash_of(prompt_id) for prompt_id in prompt_ids], np.int64)


def names(hashes: NDArray[np.int64]) -> list[str]:
    """The prompt_ids that belong to the numbers."""
    digits = hashes.astype(">i8").tobytes().hex()
    return [digits[i : i + 16] for i in range(0, len(digits), 16)]
