"""What the next round reads of a run folder, without an engine, a reward server or a trainer: through the readers of its stages."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.config import GuardConfig
from selfplay.errors import CheckpointError
from selfplay.prompts import sealing
from selfplay.prompts.draws import Draws
from selfplay.prompts.orders import Orders
from selfplay.prompts.pool import Pool
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.probes import Probes
from selfplay.rounds.history import History
from selfplay.rounds.stages import STAGES
from selfplay.storage import agreement, folders, hashes, manifests, seals, tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.schema import DECIDING
from selfplay.training import saves

PER_ROUND = 16


def use(run_dir: Path, tell: Callable[[str, str], None]) -> str:
    """Read all that a round would use of a folder; a hash of it. Raises as the readers do; `tell` takes their events."""
    hashes.forget()
    read: list[Any] = []
    store = Store(run_dir)
    try:
        agreement.require(store, run_dir, tell)
        row = store.unfinished()
        index = row["round"] if row is not None else store.last_round() + 1
        read += [store.serving(), store.rounds(), store.policies(), store.run(), _states(store), index]
        read += _pool(run_dir, store, index, is_open=row is not None)
        read += _policies(run_dir, store)
        read += _earlier(run_dir, store, index)
        read += _reward(run_dir)
        if row is not None:
            read += _under_way(run_dir / "rounds" / f"{index:04d}")
    finally:
        store.close()
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()


def _states(store: Store) -> list[Any]:
    """What is kept under names, what the schedule's end is counted by, what waits to be done, and the metrics that decide."""
    asked = ("state ORDER BY name", "totals ORDER BY of, name", "orders ORDER BY id")
    return [*(store.query(f"SELECT * FROM {each}") for each in asked), store.metrics_by_round(DECIDING)]


def _pool(run_dir: Path, store: Store, index: int, is_open: bool) -> list[Any]:
    folder = run_dir / "pool"
    sealing.open_pool(folder, store)
    pool = Pool(folder)
    draws = Draws(pool, store, run_dir / "rounds", Orders(0, folder / "orders"))
    levels = draws.levels(index) if is_open else draws.levels_ahead(index)
    drawn = levels.next(draws.orders, PER_ROUND, "reshuffle")
    return [drawn.tolist(), [vars_of(p) for p in pool], folders.read_json(folder / "initial.json")]


def vars_of(record: Any) -> list[Any]:
    return [getattr(record, name) for name in record.__dataclass_fields__]


def _policies(run_dir: Path, store: Store) -> list[Any]:
    found = Policies(run_dir)
    serving = store.serving()
    assert serving is not None
    trained_from, verified = found.verified(serving)
    # The initial policy's tokenizer and templates go into every other one; its weights are read where it is swapped in.
    return [vars_of(trained_from), vars_of(verified), vars_of(found.tokenizing(0))]


def _earlier(run_dir: Path, store: Store, index: int) -> list[Any]:
    """What guard, selection, replay and gate read of earlier rounds."""
    history = History(store, run_dir / "rounds", index)
    read: list[Any] = [history.judge_before()]
    for path in (*history.pairs(8), *history.trained_on(8)):
        read.append(tables.read_whole(path).to_pydict())
    for before in range(1, index):
        path = history.artifact(before, "score/scored.parquet")
        if path.is_file():
            read.append(tables.read_whole(manifests.require_whole(path)).to_pydict())
        history._scored_by(before)
    return read


def _reward(run_dir: Path) -> list[Any]:
    read: list[Any] = [Probes(run_dir / "reward" / "probes.json", GuardConfig())._first()]
    path = run_dir / "reward" / "scores.sqlite"
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        keys = [key for (key,) in connection.execute("SELECT key FROM scores ORDER BY key")]
    except sqlite3.DatabaseError:
        keys = []
    finally:
        connection.close()
    cache = ScoreCache(path, 10**6)
    try:
        read.append(sorted((key.hex(), score) for key, score in cache.get(keys).items()))
    finally:
        cache.close()
    for path in sorted((run_dir / "audit").glob("*.parquet")):
        if seals.is_whole(path):
            read.append(tables.read_whole(path).to_pydict())
    return read


def _under_way(folder: Path) -> list[Any]:
    """What is finished of the open round: stages, as the frame looks at them; shards; the trainer's saves."""
    read: list[Any] = []
    for stage in STAGES:
        target = folder / stage.name
        if target.is_dir():
            found = manifests.read(target / folders.MANIFEST)
            hashes.verify_files(target, found["files"], CheckpointError)
            read.append(found)
    for shards in sorted(folder.glob("*.shards")):
        files = sorted(path for path in shards.glob("*.parquet") if path.name != "asked.parquet")
        for path in files:
            if seals.is_whole(path):
                read.append(tables.read_whole(path).to_pydict())
    work = folder / "train.work"
    read += [saves.remembered(work / name) for name in saves.BESIDE]
    saves.keep_whole(work, same=True)
    read += [saves.state(save) for save in sorted(work.glob("checkpoint-*"))[-1:]]
    return read
