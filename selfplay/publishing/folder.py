"""Policies in a folder that others read from: a folder for each, and the link `current`, which changes in one step.

<folder>/0007/            the policy as a model, with a card
<folder>/current          symlink to the newest
<folder>/published.json   whose folder it is, and which policies are in it
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from selfplay.errors import CheckpointError, InputError
from selfplay.processes.places import given_umask
from selfplay.reporting.export import export_policy
from selfplay.storage import folders, hashes
from selfplay.storage.policies import Manifest

LIST, CURRENT = "published.json", "current"
NAME = re.compile(r"[0-9]{4,}")  # of the folder of a policy. Whoever can write to LIST cannot have others deleted.


def put(run_dir: Path, run: str, manifest: Manifest, root: Path) -> Path:
    """Copy a policy there, point `current` at it, and delete all but it and the one before. Returns its folder.

    Whoever can read `root` can read the policy, although what else a run writes is for its owner alone. A new `root` is made with
    the umask that the run was started with.
    Whatever was done of it before is not done again. Raises InputError for a folder that is not this run's.
    """
    known = listed(root, run)
    _make(root)
    out, before = root / f"{manifest.version:04d}", _target(root)
    _list(root, run, known | {out.name})  # first, so that nothing is made there which is not known as ours
    if out.is_dir() and not _is(out, manifest):  # damaged, or of a run that began anew under this name
        shutil.rmtree(out)
    if not out.is_dir():
        export_policy(run_dir, manifest.version, out)
    _open_as(root, out)
    if before == out.name:
        return out
    partial = root / f".{CURRENT}.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(out.name)
    partial.rename(root / CURRENT)
    folders.sync(root)
    kept = {out.name, before or out.name}
    for name in known - kept:
        shutil.rmtree(root / name, ignore_errors=True)
    _list(root, run, kept)
    return out


def _make(root: Path) -> None:
    missing = [new for new in (root, *root.parents) if not new.exists()]
    folders.make(root)
    for new in missing:
        new.chmod(0o777 & ~given_umask())


def _open_as(root: Path, out: Path) -> None:
    """Let those read a folder with its files who may read the one above it."""
    others = root.stat().st_mode & 0o055
    for path in out.iterdir():
        path.chmod(0o600 | others & 0o044)
    out.chmod(0o700 | others)


def _list(root: Path, run: str, versions: set[str]) -> None:
    folders.write_json(root / LIST, {"run": run, "versions": sorted(versions)})


def listed(root: Path, run: str) -> set[str]:
    """The policies that LIST names; none for a folder that is new or empty. Raises InputError."""
    if not (root / LIST).is_file():
        if root.is_dir() and any(path.name != f".{LIST}.partial" for path in root.iterdir()):
            hint = "name a new folder: policies are deleted there in time"
            raise InputError(f"publish.folder: {root} holds other files", hint)
        return set()
    found = folders.read_json(root / LIST)
    if found["run"] != run:
        raise InputError(f"publish.folder: {root} is that of the run {found['run']}", "name another folder")
    if strange := [name for name in found["versions"] if not NAME.fullmatch(str(name))]:
        hint = f"take it out of {root / LIST}, or name another folder: what is listed there is deleted in time"
        raise InputError(f"publish.folder: {root / LIST} names {strange[0]!r}, which is no policy", hint)
    return set(map(str, found["versions"]))


def _target(root: Path) -> str | None:
    try:
        name = Path(os.readlink(root / CURRENT)).name
    except FileNotFoundError:
        return None
    return name if NAME.fullmatch(name) else None


def _is(out: Path, manifest: Manifest) -> bool:
    try:
        files = {name: known for name, known in manifest.files.items() if "/" not in name}
        hashes.verify_files(out, files, CheckpointError)
    except CheckpointError:
        return False
    return True
