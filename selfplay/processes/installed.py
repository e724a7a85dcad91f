"""Which installed distributions have which packages, as `importlib.metadata.packages_distributions` says it.

transformers and TRL ask for this while they are imported. The standard library of Python 3.11 parses the whole metadata of a
distribution once for each of its packages, which takes a third of a second each time.
"""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict


def packages_distributions() -> dict[str, list[str]]:
    """The distributions of each top-level package, by name."""
    found: dict[str, list[str]] = defaultdict(list)
    for distribution in importlib.metadata.distributions():
        metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
        names = [line.removeprefix("Name:").strip() for line in metadata.splitlines() if line.startswith("Name:")]
        for package in (distribution.read_text("top_level.txt") or "").split() or _recorded(distribution):
            found[package] += names[:1]
    return dict(found)


def _recorded(distribution: importlib.metadata.Distribution) -> set[str]:
    """The top-level packages and modules among the files of a distribution that does not list them."""
    found = set()
    for line in (distribution.read_text("RECORD") or "").splitlines():
        path = line.partition(",")[0]
        if path.endswith(".py"):
            package, below, _ = path.partition("/")
            found.add(package if below else package.removesuffix(".py"))
    return found
