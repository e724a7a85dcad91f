"""What a round needs to know of those before it, without reading all of them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfplay.storage import folders
from selfplay.storage.ledger import Store
from selfplay.storage.manifests import require_whole
from selfplay.storage.schema import GOLD, MEAN_REWARDS

STATE = "scored_by"  # in the ledger: for which rounds the same reward gave the scores


class History:
    """The rounds of a run before round `index`."""

    def __init__(self, store: Store, rounds: Path, index: int) -> None:
        self._store, self._rounds, self._index = store, rounds, index

    def artifact(self, index: int, name: str) -> Path:
        """An artifact of a round, «stage/file»."""
        return self._rounds / f"{index:04d}" / name

    def cancelled(self) -> set[int]:
        """Rounds that were given up, perhaps for their rewards: they are no measure for this one."""
        return {row["round"] for row in self._store.query("SELECT round FROM rounds WHERE state = 'cancelled'")}

    def pairs(self, count: int) -> list[Path]:
        """Base pairs of the last `count` rounds that have any."""
        return self._of_the_last(count, "pairs/pairs.parquet")

    def trained_on(self, count: int) -> list[Path]:
        """Pairs that the last `count` rounds trained on."""
        return self._of_the_last(count, "depth/pairs.parquet")

    def _of_the_last(self, count: int, name: str) -> list[Path]:
        first = max(1, self._index - count)
        wanted = sorted(set(range(first, self._index)) - self.cancelled()) if count else []
        return [require_whole(path) for i in wanted if (path := self.artifact(i, name)).is_file()]

    def scored_alike(self) -> list[int]:
        """Earlier rounds whose rewards the same reward gave: another one has another range, and likes other things."""
        ours = self._scored_by(self._index)
        alike = [
            index
            for first, last, names in self._known()
            if names == ours
            for index in range(first, min(last, self._index - 1) + 1)
        ]
        given_up = self.cancelled()
        return [index for index in alike if index not in given_up]

    def rewards_and_gold(self, rounds: list[int]) -> list[tuple[float, float]]:
        """Mean reward and mean gold score of the policy that sampled, for each of these rounds that has both."""
        metrics = self._store.metrics_by_round([*MEAN_REWARDS, GOLD])
        return [
            (next(m[name] for name in MEAN_REWARDS if name in m), m[GOLD])
            for index in rounds
            if GOLD in (m := metrics.get(index, {})) and not m.keys().isdisjoint(MEAN_REWARDS)
        ]

    def _known(self) -> list[list[Any]]:
        """[first, last, names of what scored] of the rounds before this one; each round's file is opened once."""
        kept: list[list[Any]] = self._store.state(STATE, [])
        # Rounds from this one on may come again, under another reward, where the end of a run was cut off.
        ranges = [[first, min(last, self._index - 1), names] for first, last, names in kept if first < self._index]
        for index in range(ranges[-1][1] + 1 if ranges else 1, self._index):
            names = self._scored_by(index)
            if ranges and ranges[-1][2] == names:
                ranges[-1][1] = index
            else:
                ranges.append([index, index, names])
        if ranges != kept:
            self._store.set_state(STATE, ranges)
        return ranges

    def _scored_by(self, index: int) -> list[str] | None:
        """What gave a round its rewards; None where that is not recorded."""
        path = self.artifact(index, "score/reward.json")
        found: list[str] | None = folders.read_json(require_whole(path)).get("names") if path.is_file() else None
        return found

    def judge_before(self) -> tuple[int, list[str]] | None:
        """The last round before this one that was judged, and what its judge is known by."""
        for index in range(self._index - 1, 0, -1):
            path = self.artifact(index, "evaluate/judge.json")
            if path.is_file():
                names: list[str] | None = folders.read_json(require_whole(path)).get("names")
                return None if names is None else (index, names)
        return None
