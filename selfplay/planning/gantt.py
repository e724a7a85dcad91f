"""Who works when: spans of work, the share of a time that they fill, and lines of characters that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IDLE = "·"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of work of one lane: a GPU, or a role."""

    lane: str
    what: str
    """The stage that it belongs to."""
    start: float
    """Seconds since the beginning of the round."""
    seconds: float
    busy: float = 1.0
    """Share of the stretch in which the lane really works."""

    @property
    def end(self) -> float:
        return self.start + self.seconds


def length(spans: Iterable[Span]) -> float:
    """Seconds until the last span ends."""
    return max((span.end for span in spans), default=0.0)


def busy(spans: Sequence[Span], lane: str, seconds: float) -> float:
    """Share of so many seconds in which a lane works. What overlaps within a lane counts once."""
    if not seconds:
        return 0.0
    done, reached = 0.0, 0.0
    for span in sorted((s for s in spans if s.lane == lane), key=lambda s: s.start):
        new = max(0.0, span.end - max(span.start, reached))
        done += new * span.busy
        reached = max(reached, span.end)
    return done / seconds


def line(spans: Sequence[Span], lane: str, seconds: float, width: int) -> str:
    """A lane over so many seconds in `width` characters: each is the first letter of the stage that fills
    most of it, and idle where less than a quarter is filled."""
    cells = []
    for cell in range(width):
        low, high = seconds * cell / width, seconds * (cell + 1) / width
        shares = {IDLE: (high - low) / 4}
        for span in spans:
            if span.lane == lane and (both := min(high, span.end) - max(low, span.start)) > 0:
                shares[span.what[0]] = shares.get(span.what[0], 0.0) + both
        cells.append(max(shares, key=lambda letter: shares[letter]))
    return "".join(cells)
