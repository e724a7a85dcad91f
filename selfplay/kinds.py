"""What can be added to selfplay by one module and one line: the lines are in this file.

Each table maps a name that the configuration may use to the module that does the work. A module is imported only where
it is used, so that this file costs nothing. docs/architecture.md shows an example of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

SELECTIONS = {
    "potential": "selfplay.methods.selection.potential",
    "explicit": "selfplay.methods.selection.explicit",
    "implicit": "selfplay.methods.selection.implicit",
    "random": "selfplay.methods.selection.random",
    "fused": "selfplay.methods.selection.fused",
}
"""`pairs.selection`: what base pairs are ranked by. A module with `score(margins)`; see `methods/selection`."""

IMPLICIT_REWARDS = {
    "simpo": "selfplay.methods.implicit.simpo",
    "dpo": "selfplay.methods.implicit.dpo",
}
"""`pairs.implicit`: implicit rewards of a response. A module with `reward(…)`; see `methods/implicit`."""

TRACKERS = {
    "tensorboard": "selfplay.tracking.tensorboard",
    "wandb": "selfplay.tracking.wandb",
    "trackio": "selfplay.tracking.trackio",
}
"""`track`: where metrics go. A module with `PACKAGE`, `SECRETS`, `require()` and `open_run(…)`; see `tracking/trackers`."""

FORMATS = dict.fromkeys(
    (
        "tree", "trl", "prompt", "messages", "sharegpt", "conversations", "tree-rows", "turns", "alpaca", "question",
        "preference", "text", "inside", "lines",
    ),
    "selfplay.prompts.formats.known",
)  # fmt: skip
"""`prompts.format`: what a row of a prompt file may look like. The module has all of them in its own FORMATS."""


def resolve(table: Mapping[str, str], name: str) -> ModuleType:
    """The module that a table has under a name."""
    return importlib.import_module(table[name])


def one_of(table: Iterable[str], *more: str) -> Callable[[str], str]:
    """A check for a setting that holds a name of `table`, or one of `more`. The check raises ValueError for any other."""

    def check(name: str) -> str:
        *names, last = [*table, *more]
        if name not in (*names, last):
            raise ValueError(f"should be {', '.join(map(repr, names))} or {last!r}, not {name!r}")
        return name

    return check
