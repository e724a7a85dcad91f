"""When the next round starts: by hand, on days chosen for the purpose."""

import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from selfplay.config import EndConfig, ScheduleConfig
from selfplay.errors import ConfigError
from selfplay.service.due import next_start, trigger
from selfplay.service.schedule import SoFar, after_quiet_hours, ended, weekdays

NOON = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


def start(settings, last=None, up_since=NOON, now=NOON, jitter=0.0):
    return next_start(settings, last, up_since, now, jitter)


def test_continuous_rounds_start_at_once():
    assert start(ScheduleConfig(), last=NOON - HOUR) == NOON


def test_an_interval_runs_from_start_to_start():
    every = ScheduleConfig(mode="interval", every_minutes=90)
    assert start(every) == NOON
    assert start(every, last=NOON - HOUR, up_since=NOON - 9 * HOUR) == NOON + timedelta(minutes=30)
    late = start(every, last=NOON - 2 * HOUR, up_since=NOON - 9 * HOUR)
    assert late == NOON - timedelta(minutes=30)  # its round took longer: due since then, so at once


def test_a_cron_line_is_read_in_its_time_zone():
    nightly = ScheduleConfig(mode="cron", cron="30 1 * * *", time_zone="Europe/Paris")
    assert start(nightly) == datetime(2026, 3, 11, 1, 30, tzinfo=ZoneInfo("Europe/Paris"))


def test_what_was_missed_while_down_is_made_up_for_once_or_forgotten():
    nightly = {"mode": "cron", "cron": "0 3 * * *"}
    last = NOON - timedelta(days=4)
    assert start(ScheduleConfig(**nightly, missed="once"), last=last) == NOON
    assert start(ScheduleConfig(**nightly, missed="skip"), last=last) == NOON.replace(hour=3) + timedelta(days=1)


def test_a_clock_that_was_set_back_does_not_put_rounds_off_for_long():
    every = ScheduleConfig(mode="interval", every_minutes=60)
    assert start(every, last=NOON + 100 * HOUR, up_since=NOON - HOUR) <= NOON + HOUR


def test_jitter_puts_a_start_off_by_its_share():
    every = ScheduleConfig(mode="interval", every_minutes=60, jitter_seconds=100)
    assert start(every, jitter=0.5) == NOON + timedelta(seconds=50)


def test_jitter_puts_off_what_follows_a_round_too():
    """The last round ended at noon, the service is up since eleven, or came up an hour later; the clock may be set back."""
    after = ScheduleConfig(jitter_seconds=100)

    def due(now, up_since=NOON - HOUR, jitter=0.5, settings=after):
        return next_start(settings, NOON - HOUR, up_since, now, jitter, ended=NOON)

    assert [due(NOON + timedelta(seconds=s)) - NOON for s in (0, 30, 200)] == [timedelta(seconds=50)] * 3
    assert due(NOON + 2 * HOUR, up_since=NOON + HOUR) == NOON + HOUR + timedelta(seconds=50)
    assert due(NOON + HOUR, jitter=0.0) <= NOON + HOUR
    assert due(NOON - HOUR, up_since=NOON - 2 * HOUR) <= NOON - HOUR  # set back: the end lies in the future
    quiet = ScheduleConfig(jitter_seconds=100, quiet_hours=["12:00-13:00"])
    assert due(NOON + timedelta(seconds=70), settings=quiet) == NOON + HOUR


def test_no_round_starts_in_quiet_hours():
    """08:00-18:00 in New York is 12:00-22:00 UTC in March (summer time since the 8th); a window may pass midnight."""
    day = ScheduleConfig(quiet_hours=["08:00-18:00"], time_zone="America/New_York")
    assert after_quiet_hours(NOON, day) == NOON.replace(hour=22)
    assert after_quiet_hours(NOON.replace(hour=11), day) == NOON.replace(hour=11)
    night = ScheduleConfig(quiet_hours=["22:00-02:00", "02:00-03:30"])
    assert after_quiet_hours(NOON.replace(hour=23), night) == NOON.replace(hour=3, minute=30) + timedelta(days=1)
    assert after_quiet_hours(NOON.replace(hour=1), night) == NOON.replace(hour=3, minute=30)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({}, None),
        ({"rounds": 3}, None),
        ({"rounds": 2}, "its 2 rounds"),
        ({"date": NOON}, "it is past 2026-03-10"),
        ({"date": NOON + HOUR}, None),
        ({"reward": 0.5}, None),
        ({"reward": 0.4}, "held-out reward is 0.4"),
        ({"tokens": 301}, None),
        ({"tokens": 300}, "300 tokens were generated"),
        ({"device_hours": 8.1}, None),
        ({"device_hours": 8.0}, "8.0 device-hours"),
    ],
)
def test_the_end_of_a_schedule(end, reason):
    so_far = SoFar(rounds=2, reward=0.4, tokens=300.0, device_seconds=8 * 3600)
    found = ended(EndConfig(**end), so_far, NOON)
    assert found is None if reason is None else reason in found


def starts(settings, last, up_since, hours, jitter=0.0, began=NOON + timedelta(seconds=0.4)):
    """When rounds start if somebody asks every ten seconds."""
    found = []
    for i in range(round(hours * 360)):
        now = began + timedelta(seconds=10 * i)
        if next_start(settings, last, up_since, now, jitter) <= now:
            last = now
            found.append(now)
    return found


@pytest.mark.parametrize(("missed", "rounds"), [("skip", ["13:00"]), ("once", ["12:00", "13:00"])])
def test_after_a_missed_round_the_schedule_goes_on(missed, rounds):
    """Asked again and again, as the service does: an answer that moves on with the clock would never come."""
    hourly = ScheduleConfig(mode="cron", cron="0 * * * *", missed=missed, jitter_seconds=90)
    found = starts(hourly, NOON - timedelta(days=4), NOON + timedelta(seconds=0.4), 1.2, jitter=0.5)
    assert [f"{at:%H:%M}" for at in found] == rounds


def test_weekdays_are_those_of_cron():
    assert weekdays("0") == weekdays("7") == weekdays("Sun") == "sun"
    assert weekdays("1-5") == "mon,tue,wed,thu,fri"
    assert weekdays("fri-mon,3") == "sun,mon,wed,fri,sat"
    assert weekdays("*/2") == "sun,tue,thu,sat"
    sunday = start(ScheduleConfig(mode="cron", cron="0 3 * * 0"))
    assert f"{sunday:%A}" == "Sunday"
    with pytest.raises(ValueError, match="no day of the week"):
        weekdays("8")


@pytest.mark.parametrize("cron", ["99 * * * *", "0 0 30 2 *", "0 0 * * someday", "a b c d e"])
def test_a_cron_line_that_is_none_is_refused(cron):
    with pytest.raises(ConfigError, match=r"schedule\.cron"):
        trigger(ScheduleConfig(mode="cron", cron=cron), NOON)


@pytest.mark.slow
def test_the_hour_that_the_clocks_repeat():
    """On 2026-11-01 New York has 01:30 twice, at 05:30 and at 06:30 UTC."""
    night = datetime(2026, 11, 1, 4, 0, tzinfo=UTC)
    nightly = ScheduleConfig(mode="cron", cron="30 1 * * *", time_zone="America/New_York")
    assert [f"{at:%H:%M}" for at in starts(nightly, night - 9 * HOUR, night - 9 * HOUR, 5, began=night)] == ["05:30"]
    twice = ScheduleConfig(mode="cron", cron="*/30 1 * * *", time_zone="America/New_York")
    found = starts(twice, night - 9 * HOUR, night - 9 * HOUR, 5, began=night)
    assert [f"{at:%H:%M}" for at in found] == ["05:00", "05:30"]
    always = ScheduleConfig(mode="cron", cron="30 * * * *", time_zone="America/New_York")
    found = starts(always, night, night - 9 * HOUR, 4, began=night)
    assert [f"{at:%H:%M}" for at in found] == ["04:30", "05:30", "06:30", "07:30"]
    quiet = ScheduleConfig(quiet_hours=["22:00-01:30"], time_zone="America/New_York")
    second = after_quiet_hours(night.replace(hour=6, minute=10), quiet)
    assert second.astimezone(UTC) == night.replace(hour=6, minute=30)


@pytest.mark.parametrize(
    ("zone", "cron", "asked", "comes"),
    [
        ("Europe/Paris", "0 0 * * *", "2026-03-29 00:01", "2026-03-30 00:00+0200"),  # after a day of 23 hours
        ("Europe/Paris", "0 0 * * 1", "2026-03-27 12:00", "2026-03-30 00:00+0200"),
        ("Europe/Paris", "0 0 1 * *", "2026-03-27 12:00", "2026-04-01 00:00+0200"),
        ("America/Sao_Paulo", "0 0 * * *", "2018-11-03 12:00", "2018-11-04 01:00-0200"),  # that day has no 00:00
        ("America/Sao_Paulo", "0 0 4 11 *", "2018-11-03 12:00", "2018-11-04 01:00-0200"),
        ("America/Havana", "30 0 * * 0", "2026-03-07 12:00", "2026-03-08 01:30-0400"),
        ("Asia/Beirut", "0 0 * * *", "2026-03-29 01:01", "2026-03-30 00:00+0300"),
        ("Africa/Cairo", "0 0 * * 5", "2026-04-23 12:00", "2026-04-24 01:00+0300"),
        ("Europe/Paris", "0,30 2 * * *", "2026-03-29 03:00", "2026-03-29 03:00+0200"),  # for 02:00
        ("Europe/Paris", "30 2 * * *", "2026-03-29 03:10", "2026-03-29 03:30+0200"),  # for 02:30
        ("Australia/Lord_Howe", "10 2 * * *", "2026-10-04 01:00", "2026-10-04 02:40+1100"),  # by half an hour
        (
            "Australia/Lord_Howe",
            "10 * * * *",
            "2026-10-04 02:30",
            "2026-10-04 03:10+1100",
        ),  # every hour makes up for none
        ("Pacific/Apia", "0 12 30 12 *", "2011-12-29 12:00", "2011-12-31 12:00+1400"),  # that day did not exist
    ],
)
def test_a_time_that_the_clocks_skip_comes_later_by_as_much(zone, cron, asked, comes):
    since = datetime.fromisoformat(asked).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)
    found = start(ScheduleConfig(mode="cron", cron=cron, time_zone=zone), up_since=since, now=since)
    assert f"{found.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M%z}" == comes


@pytest.mark.slow
def test_cron_lines_follow_the_clocks_of_every_zone():
    """The short form of the script: each kind of change of the clocks in ten years once."""
    script = Path(__file__).parents[2] / "scripts" / "check_clocks.py"
    done = subprocess.run([sys.executable, str(script), "--short"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"changes of (\d+) kinds compared, 0 times wrong", done.stdout)[1]) >= 20


def test_quiet_hours_whose_end_the_clocks_skip_end_when_they_are_past_it():
    """On 2026-03-29 Paris goes from 02:00 to 03:00, at 01:00 UTC."""
    quiet = ScheduleConfig(quiet_hours=["23:00-02:30"], time_zone="Europe/Paris")
    assert after_quiet_hours(datetime(2026, 3, 29, 0, 40, tzinfo=UTC), quiet) == datetime(2026, 3, 29, 1, tzinfo=UTC)


def test_a_round_that_is_overdue_does_not_start_in_quiet_hours_either():
    every = ScheduleConfig(mode="interval", every_minutes=60, quiet_hours=["11:30-18:00"])
    assert start(every, last=NOON - 2 * HOUR, up_since=NOON - 9 * HOUR) == NOON.replace(hour=18)


@pytest.mark.parametrize(
    ("windows", "why"),
    [
        (["22:00-22:00"], "is empty"),
        (["00:00-00:00"], "is empty"),
        (["06:00-22:00", "21:00-06:00"], "cover the whole day"),
    ],
)
def test_quiet_hours_without_an_end_are_refused(windows, why):
    with pytest.raises(ValueError, match=why):
        ScheduleConfig(quiet_hours=windows)
    assert ScheduleConfig(quiet_hours=["06:00-22:00", "22:00-05:59"]).quiet_hours
