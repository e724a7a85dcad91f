"""The section `schedule`: when rounds start and when the service stops starting them."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, model_validator

from selfplay.config.base import Positive, Section


class EndConfig(Section):
    rounds: Positive | None = None
    """Stop when the run has so many rounds."""
    date: AwareDatetime | None = None
    """Start no round after this moment (ISO 8601 with an offset)."""
    reward: float | None = None
    """Stop when the current policy's mean held-out reward reaches this."""
    tokens: Positive | None = None
    """Budget of sampled tokens, over all rounds: candidates, rewrites, and answers to held-out prompts."""
    device_hours: Annotated[float, Field(gt=0)] | None = None
    """Budget of hours in finished stages, times the number of devices. These are the GPUs of `placement`. If a role has
    none of its own there, all visible GPUs count. Without any GPU the number is 1."""


class ScheduleConfig(Section):
    mode: Literal["continuous", "interval", "cron"] = "continuous"
    """When a round starts: right after the one before, every so many minutes, or at the times of a cron line."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes from the start of a round to that of the next (`interval`)."""
    cron: str | None = None
    """Five fields: minute, hour, day, month, weekday (`cron`)."""
    time_zone: str = "UTC"
    """Time zone of the cron line and of the quiet hours (an IANA name)."""
    jitter_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Each start is put off by a random time up to this."""
    quiet_hours: list[Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")]] = []
    """Times of day («22:00-06:30») in which no round starts."""
    missed: Literal["skip", "once"] = "once"
    """What happens to rounds that fell due while the service was down or paused. `skip`: nothing. `once`: a single
    round makes up for them."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """With 1 the engine samples the next round while this one trains, by the policy that this round began with. Where the gate
    then lets the new policy through, the answers are one round old: the engine scores them anew under the new policy. Only
    where the engine has processors of its own (docs/operations.md)."""
    end: EndConfig = EndConfig()
    """When the service stops starting rounds."""

    @model_validator(mode="after")
    def _complete(self) -> ScheduleConfig:
        if (self.mode == "interval") != (self.every_minutes is not None):
            raise ValueError("every_minutes goes with mode: interval, and only with it")
        if (self.mode == "cron") != (self.cron is not None):
            raise ValueError("cron goes with mode: cron, and only with it")
        if self.cron is not None and len(self.cron.split()) != 5:
            raise ValueError(f"cron {self.cron!r} has not five fields (minute hour day month weekday)")
        try:
            zoneinfo.ZoneInfo(self.time_zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"time_zone {self.time_zone!r} is no IANA time zone, such as Europe/Paris") from None
        quiet: set[int] = set()
        for window in self.quiet_hours:
            begin, end = (int(part[:2]) * 60 + int(part[3:]) for part in window.split("-"))
            if begin == end:
                raise ValueError(f"quiet_hours {window!r} is empty: it ends when it begins")
            quiet |= {minute % 1440 for minute in range(begin, end if end > begin else end + 1440)}
        if len(quiet) == 1440:
            raise ValueError("quiet_hours cover the whole day: no round would ever start")
        return self
