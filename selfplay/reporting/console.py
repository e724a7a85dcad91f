"""A console for texts of models, servers and files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from selfplay.visible import visible


class TextConsole(Console):
    """A console that takes no text for markup, and prints no character that the terminal would obey.

    What moves the cursor and what colours come from rich alone, as segments or styles of its own.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)
