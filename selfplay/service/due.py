"""When the next round is due by the schedule. APScheduler's triggers read intervals and cron lines."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from selfplay.config import ScheduleConfig
from selfplay.errors import ConfigError
from selfplay.service import schedule, wall_clock


def trigger(settings: ScheduleConfig, anchor: datetime) -> BaseTrigger:
    """An interval that counts from `anchor`, or a cron line on a clock that never changes. Raises ConfigError for no such line."""
    if settings.mode != "cron":
        seconds = round((settings.every_minutes or 0) * 60)
        return IntervalTrigger(seconds=seconds, start_date=anchor, timezone=settings.time_zone)
    found = _line(settings.cron or "")
    if found.get_next_fire_time(None, anchor) is None:
        raise ConfigError(f"schedule.cron {settings.cron!r} never comes", "minute hour day month weekday")
    return found


@functools.cache
def _line(cron: str) -> BaseTrigger:
    """A cron line in UTC; the waiting service asks for it once a second."""
    try:
        minute, hour, day, month, weekday = cron.split()
        return CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=schedule.weekdays(weekday), timezone=UTC
        )
    except ValueError as error:
        raise ConfigError(f"schedule.cron {cron!r}: {error}", "minute hour day month weekday") from None


def next_start(
    settings: ScheduleConfig, last: datetime | None, up_since: datetime, now: datetime, jitter: float,
    ended: datetime | None = None,
) -> datetime:  # fmt: skip
    """When the next round may start. Asked again later, the answer is the same until a round has started.

    last: when the last round started (by cron, before the first: when the run was created); up_since: when the service came
    up, or its pause ended, which tells what was missed. Both count as now where they lie in the future, because the clock
    was set back. For an answer that stays, the caller has to keep the moment when that was noticed.
    ended: when the last round ended, which a continuous one follows; not asked where it lies in the future.
    jitter: a number in [0, 1) for this start.
    """
    up_since = min(up_since, now)
    if settings.mode == "continuous":
        due = up_since if ended is None or ended > now else max(ended, up_since)
    elif last is None:
        due = _due(trigger(settings, up_since), up_since, settings)
    else:
        source = trigger(settings, min(last, now))
        due = _due(source, min(last, now) + timedelta(seconds=1), settings)
        if due < up_since:  # it fell due while no round could start
            due = up_since if settings.missed == "once" else _due(source, up_since, settings)
    start = schedule.after_quiet_hours(due + timedelta(seconds=jitter * settings.jitter_seconds), settings)
    if start <= now and (later := schedule.after_quiet_hours(now, settings)) > now:
        return later  # overdue, and quiet hours have begun meanwhile
    return start


def _due(source: BaseTrigger, since: datetime, settings: ScheduleConfig) -> datetime:
    """The first time at or after `since`, in UTC."""

    def following(moment: datetime) -> datetime:
        found: datetime = source.get_next_fire_time(None, moment).astimezone(UTC)
        return found

    if settings.cron is None:
        return following(since)
    hour = settings.cron.split()[1]
    return wall_clock.next_time(following, since.astimezone(UTC), ZoneInfo(settings.time_zone), hour)
