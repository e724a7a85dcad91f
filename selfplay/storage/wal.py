"""Whether the write-ahead log of a ledger is whole: SQLite reads it up to the first damaged frame, and says nothing.

After a kill, what was written last may be in this file alone. A transaction is synced before the next one begins. So where two
commits stand behind a damaged frame (one, where the frame is a commit itself), that frame was on disk, and what follows it
would be lost.

The log's index (`-shm`) is in memory that all users of a ledger share, and stays as a file when they are killed. It says how many
frames hold what was committed, and a commit is synced before the index says so: a log with fewer of them has lost some, the last
ones too. After a power cut the index is older than the log, or gone; then damage in the very last transaction, and a log that is
cut off, look as the power cut does.
(https://www.sqlite.org/fileformat2.html#walformat, https://www.sqlite.org/walformat.html#the_wal_index_file_format)
"""

from __future__ import annotations

import functools
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HEADER, FRAME = 32, 24  # bytes
INDEX, INDEX_VERSION = struct.Struct("=I8xB3xI12x8s8x"), 3007000  # there twice, then the frames that the ledger has
AGAIN = 0.1  # seconds
BIG_ENDIAN, LITTLE_ENDIAN = 0x377F0683, 0x377F0682  # the first four bytes: how checksums read their words

Words = NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What the index of a log says of it."""

    frames: int
    """Those up to the last commit."""
    in_ledger: int
    """Those that the ledger itself has."""
    salts: bytes
    """Of the log that it is the index of."""


def damage(wal: Path) -> str | None:
    """What is wrong with a write-ahead log; None where it is whole, or is not there. Another process may be writing to it."""
    found = _damage(wal)
    if found is not None:
        time.sleep(AGAIN)  # one that was begun anew while it was read looks damaged once
        found = _damage(wal)
    return found


def _damage(wal: Path) -> str | None:
    index = _index(wal.with_name(wal.name.removesuffix("-wal") + "-shm"))  # first: the log only grows meanwhile
    try:
        content = wal.read_bytes()
    except FileNotFoundError:
        content = b""
    if len(content) <= HEADER:
        lost = index.frames - index.in_ledger if index is not None else 0
        return f"it is gone, with {lost} frames that the ledger does not have" if lost > 0 else None
    magic, _, page, _, salt_1, salt_2, *sums = struct.unpack(">8I", content[:HEADER])
    if magic not in (BIG_ENDIAN, LITTLE_ENDIAN) or page < 512 or page & (page - 1) or page > 65536:
        return "its header is damaged"
    words = ">u4" if magic == BIG_ENDIAN else "<u4"
    found = _checksum((0, 0), np.frombuffer(content[:24], words))
    if found != tuple(sums):
        return "its header is damaged"
    bad, behind, enough, whole = 0, 0, 2, 0
    for number, start in enumerate(range(HEADER, len(content) - FRAME - page + 1, FRAME + page), 1):
        _, committed, own_1, own_2, *own_sums = struct.unpack(">6I", content[start : start + FRAME])
        same = (own_1, own_2) == (salt_1, salt_2)
        if not bad:
            summed = content[start : start + 8] + content[start + FRAME : start + FRAME + page]
            found = _checksum(found, np.frombuffer(summed, words))
            if not same or found != tuple(own_sums):
                bad, enough = number, 1 if committed else 2
            else:
                whole = number
        elif same and committed:  # frames of an earlier use of the file have other salts
            behind += 1
    if behind >= enough:
        return f"frame {bad} is damaged, and at least {behind} transactions behind it would be lost"
    if index is not None and index.salts == content[16:24] and index.frames > whole:
        return f"of {index.frames} frames with what was committed it has {whole} that are whole"
    return None


def _index(shm: Path) -> Index | None:
    """What the index of a log says; None where there is none, or one that was being changed when its user was killed."""
    try:
        with shm.open("rb") as file:
            content = file.read(2 * INDEX.size + 4)
    except FileNotFoundError:
        return None
    if len(content) < 2 * INDEX.size + 4 or content[: INDEX.size] != content[INDEX.size : 2 * INDEX.size]:
        return None
    version, begun, frames, salts = INDEX.unpack(content[: INDEX.size])
    if version != INDEX_VERSION or not begun:
        return None
    (in_ledger,) = struct.unpack("=I", content[2 * INDEX.size :])
    return Index(frames=frames, in_ledger=in_ledger, salts=salts)


def _checksum(start: tuple[int, int], words: Words) -> tuple[int, int]:
    """SQLite's checksum: s0 += a + s1, s1 += b + s0 for each pair of words (a, b), modulo 2³²."""
    pairs = words.astype(np.uint32).reshape(-1, 2)
    of_start, of_pairs = _coefficients(len(pairs))
    with np.errstate(over="ignore"):
        total = (pairs[:, :, None] * of_pairs).sum(axis=(0, 1), dtype=np.uint32)
        total += (np.array(start, np.uint32)[:, None] * of_start).sum(axis=0, dtype=np.uint32)
    return int(total[0]), int(total[1])


@functools.cache
def _coefficients(count: int) -> tuple[Words, Words]:
    """What (s0, s1) of the start (2, 2) and each pair of words (count, 2, 2) give to (s0, s1) in the end: a step is linear."""
    of_pairs = np.empty((count, 2, 2), np.uint32)
    last = ((1, 1), (0, 1))  # a gives to both, b to s1 alone
    step = ((1, 1), (1, 2))  # what s0 and what s1 give in one step
    for place in range(count - 1, -1, -1):
        of_pairs[place] = last
        last = _times(last, step)
    power = ((1, 0), (0, 1))
    for _ in range(count):
        power = _times(power, step)
    return np.array(power, np.uint32), of_pairs


def _times(
    left: tuple[tuple[int, int], ...], right: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], tuple[int, int]]:
    (a, b), (c, d) = left
    (e, f), (g, h) = right
    most = 2**32
    return ((a * e + b * g) % most, (a * f + b * h) % most), ((c * e + d * g) % most, (c * f + d * h) % most)
