"""How work tells what it is doing. Terminal, ledger and page show it; the work itself knows none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from selfplay.types import RoundReport


class Line(Protocol):
    """The progress of one stage."""

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        """Say how far the stage is. What is not given stays as it was."""


class Display(Protocol):
    """Where a run shows what it does."""

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

    def round_table(self, report: RoundReport) -> None:
        """Show how a round ended."""
