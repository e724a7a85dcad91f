"""Seeds: every random choice of a run derives from the run's seed and from what the choice is for."""

from __future__ import annotations

import hashlib


def derive(*parts: object) -> int:
    """A 63-bit seed from what it is for, such as (run seed, round, stage, item). Equal parts give equal seeds."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
