"""A ledger made from the folder: from the records of closed rounds, the manifests of stages and those of policies.

What is in none of them is lost: events, orders, and what was kept under names, such as a pause.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError, InputError
from selfplay.pairs.writing import read_ranked
from selfplay.prompts.draws import Draws
from selfplay.prompts.orders import Orders
from selfplay.prompts.pool import Pool
from selfplay.rounds.stages import STAGES
from selfplay.storage import closed, folders, manifests, policies, retention
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.reader import CURRENT, now

LEDGER = "ledger.sqlite"


def make(run_dir: Path) -> None:
    """Make the ledger anew; the old one is kept beside it. Raises InputError where the folder does not say enough."""
    rounds = sorted(
        int(path.name)
        for path in (run_dir / "rounds").glob("[0-9]*")
        if any(path.glob(f"*/{folders.MANIFEST}")) or (path / closed.NAME).is_file()  # given up before its first stage
    )
    records = {index: closed.read(run_dir / "rounds" / f"{index:04d}") for index in rounds}
    if rounds and rounds[:-1] and None in [records[index] for index in rounds[:-1]]:
        lacking = next(index for index in rounds[:-1] if records[index] is None)
        raise InputError(
            f"round {lacking} has no record {closed.NAME} that can be read: an earlier version closed it, or it is damaged",
            "restore ledger.sqlite from a copy: the manifests alone do not say which policy served",
        )
    scratch = run_dir / ".ledger.partial"
    folders.make(scratch)
    for path in scratch.iterdir():
        path.unlink()
    store = Store(scratch)
    for index in rounds:
        _round(run_dir, store, index, records[index])
    _policies(run_dir, store, records)
    run = next((record["run"] for record in reversed(records.values()) if record and record["run"]), None)
    if run is not None:
        store.insert("runs", run)
    if done := _without_candidates(run_dir, rounds):
        store.set_state(retention.STATE, {retention.CANDIDATES: done})
    store.event("repaired", "the ledger was made again from the manifests: events and orders of before are not in it")
    store.close()
    _set_aside(run_dir)  # not before: where the folder does not say enough, the old one stays
    os.replace(scratch / LEDGER, run_dir / LEDGER)
    for path in scratch.iterdir():
        path.unlink()
    scratch.rmdir()
    folders.sync(run_dir)


def _round(run_dir: Path, store: Store, index: int, record: dict[str, Any] | None) -> None:
    folder = run_dir / "rounds" / f"{index:04d}"
    if record is not None:
        store.insert("rounds", {**record["round"], "config": record["config"]})
    else:  # it is open
        champion = _champion(run_dir, index)
        store.insert("rounds", {
            "round": index, "state": "running", "started": now(), "ended": None, "sampler": champion, "champion": champion,
            "policy": None, "cursor": _cursor(run_dir, store, index), "fingerprint": "", "config": {}, "reasons": [],
        })  # fmt: skip
    for stage in STAGES:
        try:
            found = manifests.read(folder / stage.name / folders.MANIFEST)
        except CheckpointError:
            continue  # it is found among the stages
        store.record_stage(index, stage.name, found["seconds"], found["metrics"])
    pairs = folder / "pairs" / "pairs.parquet"
    if pairs.is_file():
        store.record_pairs(index, read_ranked(pairs))


def _policies(run_dir: Path, store: Store, records: dict[int, dict[str, Any] | None]) -> None:
    found = Policies(run_dir)
    last = next((record for record in reversed(records.values()) if record), None)
    pinned = set(last["pinned"]) if last else set[int]()
    for version in found.versions():
        manifest, record = policies.read(found.folder(version)), records.get(version)
        weights = version == 0 or any(path.name != folders.MANIFEST for path in found.folder(version).iterdir())
        state = "initial" if version == 0 else record["round"]["state"] if record else "candidate"
        store.insert("policies", {
            "version": version, "round": manifest.round, "parent": manifest.parent, "reference": manifest.reference,
            "beta": manifest.beta, "state": state, "weights": weights, "pinned": version in pinned,
        })  # fmt: skip
    if found.versions():
        version = _served(run_dir, max(records, default=0) + 1)
        store.set_state(CURRENT, {"version": version, "before": None})


def _served(run_dir: Path, before: int) -> int:
    """The policy that serves when a round opens: by `current`, which a rollback may have changed since the last record."""
    link = Policies(run_dir).current
    if link is not None and link != before and Policies(run_dir).folder(link).is_dir():
        return link
    for index in range(before - 1, 0, -1):
        if (record := closed.read(run_dir / "rounds" / f"{index:04d}")) is not None:
            return int(record["round"]["policy"])
    return 0


def _champion(run_dir: Path, index: int) -> int:
    """The policy that the open round is trained from."""
    for folder in (Policies(run_dir).folder(index), run_dir / "rounds" / f"{index:04d}" / "train" / "policy"):
        if (folder / folders.MANIFEST).is_file() and (parent := policies.read(folder).parent) is not None:
            return parent
    return _served(run_dir, index)


def _without_candidates(run_dir: Path, rounds: list[int]) -> int:
    """The newest round up to which retention has deleted candidates; 0 where it has deleted none."""
    done = 0
    for index in rounds:
        folder = run_dir / "rounds" / f"{index:04d}" / retention.SAMPLED[0]
        if (folder / folders.MANIFEST).is_file():
            if any(path.suffix != ".json" for path in folder.iterdir()):
                break
            done = index
    return done


def _cursor(run_dir: Path, store: Store, index: int) -> list[int]:
    """Where the pool stood when the open round began."""
    if not (last := store.last_round()):
        return [0, 0]
    seed = store.config(last)["run"]["seed"]
    pool = Pool(run_dir / "pool")
    return list(Draws(pool, store, run_dir / "rounds", Orders(seed, None)).cursor(index))


def _set_aside(run_dir: Path) -> None:
    for suffix in ("", "-wal", "-shm", "-journal"):
        path = run_dir / f"{LEDGER}{suffix}"
        if path.exists():
            path.rename(run_dir / f"{LEDGER}.damaged{suffix}")
