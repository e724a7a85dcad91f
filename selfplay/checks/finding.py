"""What a look at the configuration or the machine found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    level: Level
    about: str  # a key of the configuration, or what else was looked at
    text: str

    @classmethod
    def ok(cls, about: str, text: str) -> Finding:
        return cls("ok", about, text)

    @classmethod
    def warning(cls, about: str, text: str) -> Finding:
        """The run works, but perhaps not as its user wants it."""
        return cls("warning", about, text)

    @classmethod
    def error(cls, about: str, text: str) -> Finding:
        """A round would fail, and nothing is started before this is mended."""
        return cls("error", about, text)
