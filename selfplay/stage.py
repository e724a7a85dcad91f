"""What a stage of a round declares of itself, beside the function that does it.

The frame of a round (`rounds/frame.py`) asks this declaration, and nothing else, what a stage needs and leaves behind:
what has to be whole before it starts, what its folder has to hold when it ends, what is made from it and goes with it when
it is damaged, how much space it may take, which log tells more, and what its progress counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from selfplay.config import Config

Metrics = dict[str, float]


def little(config: Config, weights: int) -> int:
    """Bytes of a stage that writes some thousand numbers."""
    return 4 << 20


def samples(config: Config, weights: int) -> int:
    """Bytes of a stage that writes every candidate: ids and text of a token take 16 bytes at most."""
    settings = config.generate
    return (4 << 20) + config.prompts.per_round * settings.candidates * settings.max_tokens * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    name: str
    reads: tuple[str, ...] = ()
    """Files of earlier stages that it is made from, as «stage/file»."""
    reads_if_done: tuple[str, ...] = ()
    """The same of stages that not every round has."""
    writes: tuple[str, ...] = ()
    """Files that its folder holds when it is done. It may hold others."""
    unit: str = ""
    """What its progress counts."""
    log: str | None = None
    """Name of the process whose log tells more when it fails."""
    space: Callable[[Config, int], int] = little
    """Bytes that it may write, from the configuration and the size of the initial policy (bytes)."""

    @property
    def made_from(self) -> frozenset[str]:
        """Names of the stages that it reads."""
        return frozenset(path.partition("/")[0] for path in (*self.reads, *self.reads_if_done))


def made_from(stages: Iterable[Stage], name: str) -> list[str]:
    """The stage `name` and all that are made from it, directly or not, in the order of the round."""
    found = {name}
    for stage in stages:
        if stage.made_from & found:
            found.add(stage.name)
    return [stage.name for stage in stages if stage.name in found]
