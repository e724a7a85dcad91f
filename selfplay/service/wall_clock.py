"""When the times of a cron line come in a zone whose clocks change.

The line is read on a clock that never changes, for a trigger of APScheduler leaves out the day after one of 23 hours.
`zoneinfo` then tells at which moments the clocks of the zone show what the line asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

FURTHEST = timedelta(days=1)  # that clocks were ever set forward (Samoa, 2011)


def next_time(line: Callable[[datetime], datetime], since: datetime, zone: ZoneInfo, hour: str) -> datetime:
    """The first time of a cron line at or after `since`, both in UTC.

    A time that the clocks skip comes later, by as much as they were set forward. A time that they repeat comes at its first
    pass alone. A line with `*` in its field of hours comes at both passes; one of every hour (`*`) makes up for no skipped
    time.

    line: the first time of the line at or after another one, both as clocks on a wall show them, written as UTC; hour: the
    line's field of hours.
    """
    wall = since + _offset(since, zone) - _earlier(since, zone)
    found: list[datetime] = []
    while True:
        wall = line(wall)
        first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        moments = [first, second] if "*" in hour and first <= second else [first]
        if first > second and hour == "*":  # the clocks skip it; else `first` is counted on from before they do
            moments = []
        found += [moment for moment in moments if moment >= since]
        if found and first == second >= since:  # it comes once, so what stands later on the wall comes later too
            return min(found)
        wall += timedelta(minutes=1)


def _earlier(since: datetime, zone: ZoneInfo) -> timedelta:
    """How much earlier on the wall a time may stand that comes now: in a time skipped a moment ago, or in one that comes again."""
    now = _offset(since, zone)
    for way in (-1, 1):
        change = now - _offset(since + way * FURTHEST, zone)
        if change > timedelta(0) and _offset(since + way * change, zone) < now:
            return change
    return timedelta(0)


def _offset(moment: datetime, zone: ZoneInfo) -> timedelta:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None, "the zone knows its offset"
    return offset
