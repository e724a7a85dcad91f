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
    now, before, after = (moment.astimezone(zone).utcoffset() for moment in (since, since - FURTHEST, since + FURTHEST))
    assert now is not None and before is not None and after is not None, "the zone knows its offsets"
    # What comes now may stand earlier on the wall: in a time skipped a moment ago, or in an hour that soon comes again.
    wall = since + now - max(timedelta(0), now - min(before, after))
    found: list[datetime] = []
    while True:
        wall = line(wall)
        first, second = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
        if first > second:  # the clocks skip it, and `first` is counted on from before
            moments = [] if hour == "*" else [first]
        else:
            moments = [first, second] if "*" in hour else [first]
        found += [moment for moment in moments if moment >= since]
        if found and first == second >= since:  # it comes once, so what stands later on the wall comes later too
            return min(found)
        wall += timedelta(minutes=1)
