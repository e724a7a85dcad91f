"""What a node says about itself: the files that it sees, and the packages that it has. This runs on the node."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HASHED = 1 << 20  # The first bytes of a file that are compared.


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one node, or the controller, sees."""

    files: dict[str, str]
    """SHA-256 of the beginning of each file that was asked for, or why it cannot be read."""
    packages: dict[str, str]
    """Versions, by name; what is not installed is left out."""


def look(files: Sequence[str], packages: Sequence[str]) -> Seen:
    """Read some files and look for some packages, here."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return Seen(files={name: _hash(Path(name)) for name in files}, packages=found)


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(HASHED)).hexdigest()
    except OSError as error:
        return error.strerror or str(error)


def differences(here: Seen, there: Seen) -> list[str]:
    """In what a node differs from the controller, in words."""
    found = []
    for name, expected in here.files.items():
        said = there.files[name]
        if said != expected:
            what = "other bytes than here" if len(said) == len(expected) else said
            found.append(f"{name}: {what}")
    for name in sorted(here.packages.keys() | there.packages.keys()):
        ours, theirs = here.packages.get(name, "not installed"), there.packages.get(name, "not installed")
        if ours != theirs:
            found.append(f"{name} is {theirs}, and {ours} here")
    return found
