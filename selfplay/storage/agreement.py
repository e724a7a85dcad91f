"""Whether a run folder and its ledger tell the same, asked when a run opens. The ledger is right about what was decided:
which policy serves, which rounds there were, which policies are kept, and β.

What can be made again is made again, and told: the file `current`. For all else the run stops and says which of the two is
right, since nobody can tell a mistake from a decision by looking at the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from selfplay.errors import InputError
from selfplay.storage import folders, policies
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.reader import CURRENT

REPAIRED = "repaired"
"""Kind of the events that say what was damaged and has been made again."""
LOST = "lost_rounds"
"""In the ledger's state: rounds whose folders are gone for good, which a person was told."""
DOCTOR = "`selfplay doctor` says what is wrong in the folder, and mends what can be mended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """One thing that folder and ledger say differently."""

    path: Path
    what: str
    right: str
    """Which of the two is right, and what follows from it."""


def set_current(store: Store, found: Policies, version: int) -> None:
    """Make a policy the one that serves: in the ledger, which is right about it, and then in the file `current`."""
    # What the file names, and not what served: after a full disk the file may be behind by more than one step.
    store.set_state(CURRENT, {"version": version, "before": found.current})
    found.set_current(version)


def require(store: Store, run_dir: Path, tell: Callable[[str, str], None]) -> None:
    """Raise InputError where folder and ledger disagree, and make `current` again where it is lost; `tell` takes an event.

    A run that has no current policy yet gets policy 0.
    """
    for found in disagreements(store, run_dir):
        raise InputError(f"{found.path}: {found.what}", f"{found.right}; {DOCTOR}")
    there = Policies(run_dir)
    there.clean()
    begins = store.state(CURRENT) is None and there.current is None and not store.last_round()
    if (version := store.serving()) is None or begins:
        set_current(store, there, 0)
        return
    if (wrong := current(store, run_dir)) is not None:
        known = store.state(CURRENT)
        if there.current is not None and not (known and known["before"] == there.current):
            raise InputError(f"{wrong.path}: {wrong.what}", f"{wrong.right}; {DOCTOR}")
        there.set_current(version)  # it is lost, or its writer was ended before it came to it
        tell(REPAIRED, f"{wrong.path}: {wrong.what}. It names policy {version} again")
    if store.state(CURRENT) is None:  # a ledger of an earlier version
        is_open = store.unfinished()
        # There the file alone says that the open round has promoted its policy, and the round does not do that again.
        promoted = is_open is not None and there.current == is_open["round"]
        store.set_state(CURRENT, {"version": there.current if promoted else version, "before": None})


def disagreements(store: Store, run_dir: Path) -> Iterator[Disagreement]:
    """Damaged rows, and all in which folder and ledger disagree but the file `current`."""
    for row in store.damaged_rows():
        yield Disagreement(
            path=store.path, what=f"it is damaged: {row} is not what was written",
            right="put it back from a copy; without one, `selfplay doctor` makes it again from the manifests of the folder",
        )  # fmt: skip
    yield from rounds(store, run_dir)
    yield from kept_policies(store, run_dir)


def current(store: Store, run_dir: Path) -> Disagreement | None:
    """Whether `current` leads to another policy than the one that serves by the ledger."""
    version, link = store.serving(), Policies(run_dir).current
    if version is None or link == version:
        return None
    row = store.unfinished()
    if store.state(CURRENT) is None and row is not None and link == row["round"]:
        return None  # a round of an earlier version that was promoted, and not closed yet
    return Disagreement(
        path=run_dir / "current",
        what="it names no policy" if link is None else f"it names policy {link}",
        right=f"by the ledger policy {version} serves, and the ledger is right",
    )


def rounds(store: Store, run_dir: Path) -> Iterator[Disagreement]:
    """Rounds of which only the ledger, or only the folder, knows."""
    there = {int(path.name): path for path in _numbered(run_dir / "rounds")}
    lost = set(store.state(LOST, []))
    known = {row["round"]: row["state"] for row in store.query("SELECT round, state FROM rounds")}
    for index, state in known.items():
        if index not in there and index not in lost and state not in ("running", "cancelled"):
            yield Disagreement(
                path=run_dir / "rounds" / f"{index:04d}",
                what=f"it is gone, and the ledger knows round {index} as {state}",
                right="the ledger is right: put the folder back from a copy",
            )
    for index, path in sorted(there.items()):
        # The next round may be sampled before it opens (schedule.ahead); then it has shards, and no stage.
        if index not in known and any(path.glob(f"*/{folders.MANIFEST}")):
            yield Disagreement(
                path=path,
                what=f"the ledger does not know round {index}",
                right="the folder is right where the ledger is an older copy: put the newest ledger back",
            )


def kept_policies(store: Store, run_dir: Path) -> Iterator[Disagreement]:
    """Policies that are kept by the ledger and not there, of which the ledger knows nothing, or whose β differs."""
    found = Policies(run_dir)
    rows = {row["version"]: row for row in store.policies()}
    for version, row in rows.items():
        path = found.folder(version) / folders.MANIFEST
        if not row["weights"]:
            continue
        if not path.is_file():
            yield Disagreement(
                path=path,
                what=f"it is gone, and the ledger keeps policy {version}",
                right="the ledger is right: put the folder of the policy back from a copy",
            )
        elif version and (beta := policies.read(path.parent).beta) != row["beta"]:
            yield Disagreement(
                path=path,
                what=f"β of policy {version} is {beta!r} there and {row['beta']!r} in the ledger",
                right="the ledger is right: put the folder of the policy back from a copy",
            )
    is_open = store.unfinished()
    for path in _numbered(found.root):
        version = int(path.name)
        if version and version not in rows and not (is_open and is_open["round"] == version):
            yield Disagreement(
                path=path,
                what=f"the ledger does not know policy {version}",
                right="the folder is right where the ledger is an older copy: put the newest ledger back",
            )


def _numbered(root: Path) -> list[Path]:
    return [path for path in folders.inside(root) if path.name.isdigit()]
