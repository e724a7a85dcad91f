"""When the next round starts, and when no more do: pure functions of the schedule, the past and the present."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from selfplay.config import EndConfig, ScheduleConfig

MINUTE = timedelta(minutes=1)
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def weekdays(field: str) -> str:
    """The weekday field of a cron line by names, as APScheduler takes it: its numbers begin with Monday, cron's with Sunday.

    Raises ValueError for what is no such field.
    """
    if field == "*":
        return field
    days: set[int] = set()
    for part in field.lower().split(","):
        found = re.fullmatch(r"(\*|[0-7]|[a-z]{3})(?:-([0-7]|[a-z]{3}))?(?:/([1-7]))?", part)
        if found is None:
            raise ValueError(f"{part!r} is no day of the week (0-7, both 0 and 7 Sunday, or sun-sat)")
        first, last, step = found.groups()
        begin = 0 if first == "*" else _day(first)
        end = _day(last) if last else (6 if first == "*" or step else begin)
        days |= {day % 7 for day in range(begin, (end if end >= begin else end + 7) + 1, int(step or 1))}
    return ",".join(DAYS[day] for day in sorted(days))


def _day(text: str) -> int:
    if text.isdigit():
        return int(text)
    if text not in DAYS:
        raise ValueError(f"{text!r} is no day of the week (sun, mon, tue, wed, thu, fri, sat)")
    return DAYS.index(text)


def after_quiet_hours(start: datetime, schedule: ScheduleConfig) -> datetime:
    """`start`, or the end of the quiet hours that it falls into (in the schedule's time zone)."""
    zone = ZoneInfo(schedule.time_zone)
    moved = True
    for _ in range(len(schedule.quiet_hours) + 1):  # one window may end in another
        moved = False
        for window in schedule.quiet_hours:
            begin, end = (time.fromisoformat(part) for part in window.split("-"))
            local = start.astimezone(zone)
            now = local.time().replace(tzinfo=None)
            overnight = begin > end
            if not ((begin <= now or now < end) if overnight else begin <= now < end):
                continue
            day = local.date() + timedelta(days=1 if overnight and now >= begin else 0)
            on_the_wall = datetime.combine(day, end)
            ends = on_the_wall.replace(tzinfo=zone).astimezone(UTC)
            if ends <= start:  # in an hour that the clocks repeat: its second time
                ends = on_the_wall.replace(tzinfo=zone, fold=1).astimezone(UTC)
            else:  # in an hour that they skip: when they do
                while (ends - MINUTE).astimezone(zone).replace(tzinfo=None) >= on_the_wall:
                    ends -= MINUTE
            start, moved = ends, True
        if not moved:
            break
    return start


@dataclass(frozen=True, slots=True, kw_only=True)
class SoFar:
    """What a run has done, as far as its end may depend on it."""

    rounds: int  # finished ones, without those that were given up
    reward: float | None  # of the current policy, on held-out prompts, in the round that it is from
    tokens: float  # sampled
    device_seconds: float  # in stages, times devices


def ended(end: EndConfig, so_far: SoFar, now: datetime) -> str | None:
    """Why no further round starts, or None."""
    if end.rounds is not None and so_far.rounds >= end.rounds:
        return f"the run has its {end.rounds} rounds (schedule.end.rounds)"
    if end.date is not None and now >= end.date:
        return f"it is past {end.date.isoformat()} (schedule.end.date)"
    reward = so_far.reward
    if end.reward is not None and reward is not None and reward >= end.reward:
        return f"the current policy's held-out reward is {reward:.4g}, the target {end.reward:g} (schedule.end.reward)"
    if end.tokens is not None and so_far.tokens >= end.tokens:
        return f"{so_far.tokens:.0f} tokens were generated, the budget is {end.tokens} (schedule.end.tokens)"
    hours = so_far.device_seconds / 3600
    if end.device_hours is not None and hours >= end.device_hours:
        return f"{hours:.1f} device-hours were used, the budget is {end.device_hours:g} (schedule.end.device_hours)"
    return None
