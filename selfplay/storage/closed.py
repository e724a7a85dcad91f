"""What the ledger says of a round that has ended, in a file beside its stages: `rounds/0003/closed.json`.

Manifests say what the stages made. Without this file a ledger that is lost could not be made again as it was: which policy
serves, what is pinned, where the pool stood, and when the run began.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.storage import folders, seals
from selfplay.storage.ledger import Store
from selfplay.storage.reader import now

NAME = "closed.json"
FIELDS = ("run", "round", "config", "pinned")


def write(folder: Path, store: Store, index: int, *, state: str, policy: int, reasons: list[str]) -> None:
    """Write the record of a round that is about to be closed in the ledger. `folder`: of the round."""
    folders.make(folder)
    row = store.round(index) | {"state": state, "policy": policy, "reasons": reasons, "ended": now()}
    pinned = [each["version"] for each in store.policies_with_weights() if each["pinned"]]
    seals.write_json(folder / NAME, {"run": store.run(), "round": row, "config": store.config(index), "pinned": pinned})


def read(folder: Path) -> dict[str, Any] | None:
    """The record of a round; None where it has none, or one that is damaged."""
    try:
        return seals.read_json(folder / NAME, FIELDS)
    except (FileNotFoundError, NotADirectoryError, CheckpointError):
        return None
