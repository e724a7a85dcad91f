"""The policies of a run and its averaged references: manifests and weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from selfplay.doctor.finding import Finding
from selfplay.errors import CheckpointError
from selfplay.storage import policies
from selfplay.storage.folders import MANIFEST
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.references import MODEL, References


def look(run_dir: Path, store: Store | None) -> Iterator[Finding]:
    """What is damaged. Of a policy whose weights retention has deleted, only the manifest is looked at."""
    found, rows = Policies(run_dir), {} if store is None else {row["version"]: row for row in store.policies()}
    serving = None if store is None else store.serving()
    for version in found.versions():
        path, row = found.folder(version), rows.get(version)
        kept = row["weights"] if row is not None else any(each.name != MANIFEST for each in path.iterdir())
        try:
            manifest = policies.read(path)
            if kept or version == 0:
                policies.verify(path)
        except CheckpointError as error:
            yield Finding(path=path, what=str(error), mend=_mend(version, serving, row is not None))
            continue
        if row is not None and version and (manifest.parent, manifest.reference) != (row["parent"], row["reference"]):
            yield Finding(
                path=path / MANIFEST,
                what=f"parent {manifest.parent} and reference {manifest.reference}; the ledger has {row['parent']} and {row['reference']}",
                mend="put the folder back from a copy: the ledger is right",
            )
    yield from _references(run_dir)


def _mend(version: int, serving: int | None, known: bool) -> str:
    copy = "put the folder back from a copy"
    if version == 0:
        return f"{copy}, or the initial policy to where it was (policy.model): every round needs it"
    if version == serving:
        return f"{copy}, or make another policy the current one (selfplay rollback N): this one serves"
    return f"{copy}; no later round needs it unless it is pinned, or a reference" if known else copy


def _references(run_dir: Path) -> Iterator[Finding]:
    found = References(run_dir)
    for path in sorted(found.root.glob("[0-9]*")):
        if not (path / MODEL).is_dir():
            continue
        try:
            found.get(int(path.name))
        except CheckpointError as error:
            yield Finding(
                path=path, what=str(error), mend="the average is made again from the one before",
                repair=functools.partial(found.delete, int(path.name)),
            )  # fmt: skip
