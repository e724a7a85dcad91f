"""Compare when cron lines come with what the clocks of every time zone showed, minute by minute.

    python scripts/check_clocks.py                    every zone, ten years (some minutes)
    python scripts/check_clocks.py --short            each kind of change of the clocks once (some seconds)
    python scripts/check_clocks.py --first 2006 --last 2016

The oracle knows no rule of any zone. It walks through the minutes of UTC, asks `zoneinfo` what the clocks show, and sees by
that alone which times are skipped or repeated. What is documented for these times (docs/operations.md) it does itself.
"""

from __future__ import annotations

import argparse
import sys
import time
import zoneinfo
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np

from selfplay.config import ScheduleConfig
from selfplay.service.due import next_start

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SPARSE = (
    "0 0 * * *", "30 0 * * *", "59 23 * * *", "30 2 * * *", "0 0 * * 0", "0 0 * * 1", "0 0 * * 6", "30 0 1 * *",
    "0 0 29-31 * *", "15 1 1 1-12/3 *", "0 0,3,12 * * 1-5", "0 */6 * * *",
)  # fmt: skip
LONG = ("0 0 * * *", "30 0 * * 1", "30 0 1 * *")  # over all the years
DENSE = ("* * * * *", "*/20 * * * *", "30 * * * *", "*/7 */2 * * *", "*/10 0-3 * * *", "5 22,23,0,1 * * *", "* 2 * * *")
LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))  # of minute, hour, day, month, weekday


class Walk:
    """What the clocks of a zone show at every minute from `first` on, and which times they skip and repeat."""

    def __init__(self, zone: ZoneInfo, first: datetime, last: datetime) -> None:
        self.zone, self.first = zone, first
        minutes = round((last - first) / MINUTE)
        offsets = np.empty(minutes, np.int64)  # minutes ahead of UTC
        for k in range(0, minutes, 60):
            ends = min(k + 60, minutes)
            if (same := self._offset(k)) == self._offset(ends):
                offsets[k:ends] = same
            else:
                offsets[k:ends] = [self._offset(one) for one in range(k, ends)]
        wall = np.datetime64(first.replace(tzinfo=None), "m") + np.arange(minutes) + offsets
        latest = np.maximum.accumulate(wall)
        again = np.concatenate([[False], wall[1:] <= latest[:-1]])
        jumps = np.flatnonzero(np.diff(wall) > np.timedelta64(1, "m"))
        lost = [np.arange(wall[k] + 1, wall[k + 1]) for k in jumps if not again[k + 1]]
        later = [k + 1 + np.arange(len(times)) for k, times in zip(jumps, lost, strict=True)]
        self.minute = np.concatenate([np.arange(minutes), *later])  # of UTC at which each time on the wall comes
        self.again = np.concatenate([again, *(np.zeros(len(times), bool) for times in lost)])
        self.lost = np.concatenate([np.zeros(minutes, bool), *(np.ones(len(times), bool) for times in lost)])
        wall = np.concatenate([wall, *lost])
        days, months = wall.astype("datetime64[D]"), wall.astype("datetime64[M]")
        in_day = (wall - days).astype(np.int64)
        self.fields = (
            in_day % 60, in_day // 60, (days - months.astype("datetime64[D]")).astype(np.int64) + 1,
            months.astype(np.int64) % 12 + 1, (days.astype(np.int64) + 4) % 7,
        )  # fmt: skip

    def _offset(self, minute: int) -> int:
        offset = (self.first + minute * MINUTE).astimezone(self.zone).utcoffset()
        assert offset is not None and not offset % MINUTE, "whole minutes, as everywhere since 1972"
        return offset // MINUTE

    def due(self, line: str) -> list[datetime]:
        """When a line comes, in UTC."""
        fields = line.split()
        comes = np.ones(len(self.minute), bool)
        for text, values, limits in zip(fields, self.fields, LIMITS, strict=True):
            if text != "*":
                named = np.zeros(limits[1] + 1, bool)
                named[list(expand(text, *limits))] = True
                comes &= named[values]
        hour = fields[1]
        if "*" not in hour:
            comes &= ~self.again
        if hour == "*":
            comes &= ~self.lost
        return [self.first + int(k) * MINUTE for k in np.unique(self.minute[comes])]


def expand(field: str, low: int, high: int) -> Iterator[int]:
    for part in field.split(","):
        span, _, step = part.partition("/")
        begin, _, end = (f"{low}-{high}" if span == "*" else span).partition("-")
        yield from range(int(begin), int(end or begin) + 1, int(step or 1))


def changes(zone: ZoneInfo, first: datetime, last: datetime, step: timedelta) -> Iterator[datetime]:
    """The first minute of each new offset; two changes within a `step` that make each other good are not seen."""
    before = first
    while before < last:
        after, low = before + step, before
        while after - low > MINUTE and after.astimezone(zone).utcoffset() != before.astimezone(zone).utcoffset():
            middle = low + (after - low) // MINUTE // 2 * MINUTE
            if middle.astimezone(zone).utcoffset() == before.astimezone(zone).utcoffset():
                low = middle
            else:
                after = middle
        if after - low == MINUTE:
            yield after
        before += step


def starts(line: str, zone: ZoneInfo, since: datetime, until: datetime) -> list[datetime]:
    """When the service starts rounds by a cron line, where each start follows the one before."""
    settings = ScheduleConfig(mode="cron", cron=line, time_zone=zone.key)
    found: list[datetime] = []
    last, now = None, since
    while (due := next_start(settings, last, since, now, 0.0)) < until:
        found.append(due)
        last, now = due, due + timedelta(seconds=40)
    return found


def compare(line: str, walk: Walk, since: datetime, until: datetime) -> list[str]:
    right = [due for due in walk.due(line) if since <= due < until]
    found = starts(line, walk.zone, since, until)
    wrong = sorted(set(right) ^ set(found)) if found != right else []
    return [
        f"{walk.zone.key} «{line}»: {'comes' if at in found else 'is missing'} at {at.astimezone(walk.zone).isoformat()}"
        for at in wrong[:3]
    ]


def around(zone: ZoneInfo, change: datetime, dense: bool, every: int) -> Iterator[str]:
    """Wrong times around a change: of lines, of a line for every so many minutes of the day, and asked at every so many minutes."""
    walk = Walk(zone, change - 5 * DAY, change + 5 * DAY)
    since, until = change - DAY - HOUR, change + 2 * DAY
    for line in (*SPARSE, *(f"{k % 60} {k // 60} * * *" for k in range(change.toordinal() % every, 1440, every))):
        yield from compare(line, walk, since, until)
    for line in DENSE if dense else ():
        yield from compare(line, walk, change - 65 * MINUTE, change + 65 * MINUTE)
    for line in ("30 2 * * *", "0 0 * * *", "20,40 * * * *"):
        due = walk.due(line)
        settings = ScheduleConfig(mode="cron", cron=line, time_zone=zone.key)
        for asked in (since + k * MINUTE for k in range(0, 3 * 1440, every)):
            right = next(at for at in due if at >= asked)
            if (found := next_start(settings, None, asked, asked, 0.0)) != right:
                yield f"{zone.key} «{line}» asked at {asked.isoformat()}: {found.isoformat()} instead of {right.isoformat()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare cron lines with the clocks of every zone.")
    parser.add_argument("--first", type=int, default=2017)
    parser.add_argument("--last", type=int, default=2026, help="the last year (it is compared too)")
    parser.add_argument("--short", action="store_true", help="each kind of change once, and no whole years")
    args = parser.parse_args()
    first, last = (datetime(year, 1, 1, tzinfo=UTC) for year in (args.first, args.last + 1))
    began, kinds, seen = time.monotonic(), set(), set()
    wrong: list[str] = []
    count = 0
    for name in sorted(zoneinfo.available_timezones()):
        zone = ZoneInfo(name)
        found = tuple(changes(zone, first, last, 7 * DAY if args.short else 6 * HOUR))
        past = tuple((at, at.astimezone(zone).utcoffset()) for at in found)
        if not found or past in seen:  # one and the same clock under another name
            continue
        seen.add(past)
        for change in found:
            after, before = (at.astimezone(zone) for at in (change, change - MINUTE))
            kind = (before.utcoffset() - after.utcoffset(), before.time())  # type: ignore[operator]
            if kind not in kinds:
                wrong += around(zone, change, True, 240 if args.short else 5)
            elif not args.short:
                wrong += around(zone, change, False, 180)
            count += kind not in kinds or not args.short
            kinds.add(kind)
        if not args.short:
            walk = Walk(zone, first - 3 * DAY, last + 40 * DAY)
            wrong += [text for line in LONG for text in compare(line, walk, first, last)]
            print(f"{name}: {len(found)} changes, {time.monotonic() - began:.0f} s", flush=True)
    for text in wrong[:50]:
        print(text)
    print(
        f"{args.first} to {args.last}: {len(seen)} clocks that change, {count} changes of {len(kinds)} kinds compared, "
        f"{len(wrong)} times wrong ({time.monotonic() - began:.0f} s)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
