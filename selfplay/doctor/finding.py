"""What the doctor finds: a file, what is wrong with it, and what can be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    path: Path
    what: str
    """What is wrong with it."""
    mend: str
    """What `repair` does; where there is none, what a person can do."""
    repair: Callable[[], object] | None = None
    """Makes the file again, or drops what is made again by the next round. Nothing that counts is lost."""
