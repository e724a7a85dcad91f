"""The rounds of a run: every file of every stage against its manifest, and of the open round shards and saves too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from selfplay.doctor.finding import Finding
from selfplay.errors import CheckpointError
from selfplay.rounds.stages import STAGES
from selfplay.stage import made_from
from selfplay.storage import closed, folders, hashes, manifests, retention, seals
from selfplay.storage.ledger import Store
from selfplay.training import saves

COPY = "put it back from a copy"


def look(run_dir: Path, store: Store | None) -> Iterator[Finding]:
    """What is damaged in the folders of the rounds. Without a ledger every round counts as one that has ended."""
    sampled = retention.deleted(store).get(retention.CANDIDATES, 0) if store is not None else 2**62
    is_open = store.unfinished() if store is not None else None
    for folder in sorted(path for path in (run_dir / "rounds").glob("[0-9]*") if path.is_dir()):
        index = int(folder.name)
        goes_on = is_open is not None and index == is_open["round"]
        for stage in (stage.name for stage in STAGES):
            if (folder / stage).is_dir():
                lost = stage in retention.SAMPLED and index <= sampled
                if found := _stage(folder / stage, lost):
                    yield _open(folder, stage, *found) if goes_on else _ended(*found)
        if goes_on:
            yield from _under_way(folder)
        elif (folder / closed.NAME).is_file() and closed.read(folder) is None:
            yield _record(folder, store, index)


def _stage(folder: Path, lost: bool) -> tuple[Path, str] | None:
    """The first damaged file of a stage, and what is wrong with it. `lost`: retention has deleted its rows."""
    try:
        files = manifests.read(folder / folders.MANIFEST)["files"]
    except CheckpointError as error:
        return folder / folders.MANIFEST, str(error)
    for name, expected in files.items():
        if lost and not name.endswith(".json"):
            continue
        try:
            hashes.verify_files(folder, {name: expected}, CheckpointError)
        except CheckpointError as error:
            return folder / name, str(error).removeprefix(f"{folder / name} ")
    return None


def _open(folder: Path, stage: str, path: Path, what: str) -> Finding:
    """A damaged stage of the round that is open: it is done again, with all that was made from it."""
    after = [folder / name for name in made_from(STAGES, stage) if (folder / name).is_dir()]
    adopted = (folder.parents[1] / "policies" / folder.name).is_dir()
    if adopted and any(each.name == "train" for each in after):
        return Finding(
            path=path, what=what, mend=f"{COPY}, or give the round up (selfplay cancel): its policy is made from it"
        )
    names = ", ".join(each.name for each in after)
    return Finding(path=path, what=what, mend=f"the round does {names} again", repair=_deleting(after))


def _ended(path: Path, what: str) -> Finding:
    return Finding(
        path=path,
        what=what,
        mend=f"{COPY}. Without one, rename it: later rounds go on without it, pages and exports too",
    )


def _under_way(folder: Path) -> Iterator[Finding]:
    """Shards and saves of the open round, each of which is made again."""
    sealed = {path.with_name(path.name.removesuffix(seals.BESIDE)) for path in folder.glob(f"*.shards/*{seals.BESIDE}")}
    for file in sorted({*folder.glob("*.shards/*.parquet"), *sealed}):
        if not seals.is_sealed(file):
            repair = _deleting([file, seals.beside(file)])
            yield Finding(path=file, what="it is not what its hash says", mend="it is made again", repair=repair)
    work = folder / "train.work"
    for name, fields in saves.BESIDE.items():
        if (work / name).is_file() and not _reads(functools.partial(seals.read_json, work / name, fields)):
            yield Finding(
                path=work / name, what="it cannot be read", mend="it is made again", repair=_deleting([work / name])
            )
    for save in sorted(work.glob("checkpoint-*")):
        if (save / saves.STATE).is_file() and not _reads(functools.partial(saves.require_whole, save)):
            yield Finding(path=save, what="it is not what its hashes say", mend="training goes on from the save before it",
                          repair=_deleting([save]))  # fmt: skip


def _record(folder: Path, store: Store | None, index: int) -> Finding:
    path = folder / closed.NAME
    if store is None:
        return Finding(path=path, what="it cannot be read", mend=COPY)
    row = store.round(index)
    again = functools.partial(
        closed.write, folder, store, index, state=row["state"], policy=row["policy"], reasons=row["reasons"]
    )
    return Finding(path=path, what="it cannot be read", mend="it is written again from the ledger", repair=again)


def _reads(read: Callable[[], object]) -> bool:
    try:
        read()
    except CheckpointError:
        return False
    return True


def _deleting(paths: Sequence[Path]) -> Callable[[], None]:
    def delete() -> None:
        for path in paths:
            folders.delete(path)

    return delete
