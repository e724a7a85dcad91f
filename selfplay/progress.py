"""How work tells what it is doing. Terminal, ledger and page show it; the work itself knows none of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from selfplay.types import RoundReport


class Line(Protocol):
    """The progress of one stage."""

    round_index: int | None
    """The round of the stage; None for what is done before the first one."""
    name: str
    unit: str
    """What is counted, such as «prompts»; empty where nothing is."""
    done: int
    total: int | None
    """How many there are; None where that is not known."""
    text: str
    """What the stage does now, in words."""

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        """Say how far the stage is. What is not given stays as it was."""


class Display(Protocol):
    """Where a run shows what it does. Several threads may use it."""

    on_line: Callable[[Line], None]
    """Told of every change of a stage's progress. It must return at once."""

    def stage(
        self, round_index: int | None, name: str, total: int | None = None, unit: str = ""
    ) -> AbstractContextManager[Line]:
        """Show the progress of a stage while the context is open."""

    def kept(self, round_index: int, name: str) -> None:
        """Say that a stage was finished before an interruption."""

    def note(self, text: str) -> None:
        """Show a sentence."""

    def warn(self, text: str) -> None:
        """Show a sentence that a person should read."""

    def error(self, error: str | BaseException, hint: str = "", log: Path | None = None) -> None:
        """Show what went wrong, what to do and where the log is. Hint and log come from the error if not given."""

    def round_table(self, report: RoundReport) -> None:
        """Show how a round ended."""


@contextmanager
def waiting(line: Line, what: str) -> Iterator[None]:
    """Say what a stage waits for, while it does."""
    line.update(text=f"waits for {what}")
    yield
    line.update(text="")


def left(seconds: float) -> str:
    """How long something will take yet, in words: «40 s left», «3 min left», «1.5 h left»."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
