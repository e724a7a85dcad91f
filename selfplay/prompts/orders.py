"""The order of an epoch: where each prompt stands in it.

A place is the hash of the run's seed, the epoch and the prompt's own id, so the order of the prompts that were there does
not change when others join. A million hashes take about a second. They are made once an epoch and kept in a file,
`<epoch>-<number of prompts>.npz`; for prompts that join, only their own places are added.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfplay.prompts.formats import names
from selfplay.storage import folders

WORTH_KEEPING = 4096  # places that take some milliseconds to make; fewer are made again by the next process
AT_A_TIME = 1 << 16  # hashes whose texts are in memory
KEPT = 3  # orders in memory


def places(run_seed: int, epoch: int, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place (n,) of each prompt in the order of an epoch, uniform in 0 … 2^63 − 1; `hashes`: of the prompts."""
    # The same number as seeds.derive(run_seed, "prompts", epoch, prompt_id), in half the time.
    before = f"{run_seed}\0prompts\0{epoch}\0".encode()
    found = np.empty(len(hashes), np.int64)
    for start in range(0, len(hashes), AT_A_TIME):
        some = names(hashes[start : start + AT_A_TIME])
        digests = b"".join(hashlib.blake2b(before + name.encode(), digest_size=8).digest() for name in some)
        found[start : start + AT_A_TIME] = np.frombuffer(digests, ">u8") >> np.uint64(1)
    return found


class Orders:
    """The orders of the training prompts of one pool, which are given in the order that they came."""

    def __init__(self, run_seed: int, folder: Path | None) -> None:
        """`folder`: where places are kept; None: nowhere."""
        self._seed, self._folder = run_seed, folder
        self._places: dict[int, NDArray[np.int64]] = {}
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def places(self, epoch: int, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places (n,) of the prompts in the order of an epoch."""
        known = self._places.get(epoch)
        if known is None:
            known = self._read(epoch, hashes)
        if len(known) < len(hashes):
            new = places(self._seed, epoch, hashes[len(known) :])
            known = np.concatenate([known, new])
            if len(new) >= WORTH_KEEPING:
                self._write(epoch, known)
        # A round asks for the epoch that runs, and at its end for the next one.
        self._places = {e: kept for e, kept in self._places.items() if abs(e - epoch) <= 1} | {epoch: known}
        return known[: len(hashes)]

    def order(self, epoch: int, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The prompts (n,), as indices of `hashes`, in the order of an epoch."""
        key = epoch, len(hashes)
        if key not in self._orders:
            if len(self._orders) >= KEPT:
                self._orders.clear()
            self._orders[key] = np.argsort(self.places(epoch, hashes), kind="stable")
        return self._orders[key]

    def _read(self, epoch: int, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        nothing = np.empty(0, np.int64)
        there = folders.inside(self._folder) if self._folder else ()
        files = [file for file in there if file.match(f"{epoch:08d}-*.npz")]
        for file in sorted(files, key=lambda file: int(file.stem.partition("-")[2]), reverse=True):
            try:
                with np.load(file) as kept:  # it checks the sum of what it reads
                    found: NDArray[np.int64] = kept["places"]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                continue  # it only saves time
            both = min(len(found), len(hashes))
            sample = np.linspace(0, both - 1, min(both, 8)).astype(np.int64)
            # The folder may have been copied from a run of another seed, or of other prompts.
            if both and (places(self._seed, epoch, hashes[sample]) == found[sample]).all():
                return found
        return nothing

    def _write(self, epoch: int, found: NDArray[np.int64]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(exist_ok=True)
        name = f"{epoch:08d}-{len(found)}.npz"
        with folders.whole(self._folder / name) as partial, partial.open("wb") as file:
            np.savez(file, places=found)
        for file_ in self._folder.glob("*.npz"):
            of = int(file_.stem.partition("-")[0])
            if of < epoch - 1 or (of == epoch and file_.name != name):
                file_.unlink()
