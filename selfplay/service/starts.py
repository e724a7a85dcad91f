"""Whether a round may start now: the schedule and its end.

The waiting service asks once a second, so nothing here reads more of the ledger than its newest rounds and its sums.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from selfplay import seeds
from selfplay.config import Config, PlacementConfig
from selfplay.processes import gpus
from selfplay.service import schedule
from selfplay.service.due import next_start
from selfplay.storage.ledger import Store
from selfplay.storage.schema import JUDGED


class Starts:
    """When rounds start. It keeps what has to last from one question to the next."""

    def __init__(self, now: datetime) -> None:
        self.up_since = now
        """Since when rounds can start: what fell due before was missed."""
        self._set_back: tuple[datetime, datetime] | None = None  # a start in the future, and when it was noticed

    def why_not(
        self, config: Config, store: Store, last: dict[str, Any] | None, now: datetime
    ) -> tuple[str, str] | None:
        """State («ended» or «waiting») and reason for starting no round now, or None. `last`: the newest round, closed."""
        if reason := self._ended(config, store, now):
            return "ended", reason
        settings = config.schedule
        start = last["started"] if last else store.created() if settings.cron is not None else None
        begun = None if start is None else self._not_after(now, datetime.fromisoformat(start))
        self.up_since = min(self.up_since, now)
        jitter = seeds.derive(config.run.seed, "jitter", last["round"] if last else 0) / 2**63
        ended = datetime.fromisoformat(last["ended"]) if last else None
        due = next_start(settings, begun, self.up_since, now, jitter, ended)
        return None if due <= now else ("waiting", due.isoformat(timespec="seconds"))

    def _ended(self, config: Config, store: Store, now: datetime) -> str | None:
        """Why the schedule has no further round, or None."""
        end = config.schedule.end
        if all(value is None for _, value in end):
            return None
        current, totals = store.serving() or 0, store.all_totals()
        so_far = schedule.SoFar(
            rounds=int(sum(count for state, count in totals.get("rounds", {}).items() if state != "cancelled")),
            reward=None if end.reward is None else store.metric(current, JUDGED),
            tokens=sum(totals.get("tokens", {}).values()),
            device_seconds=sum(totals.get("stages", {}).values()) * devices(config.placement),
        )
        return schedule.ended(end, so_far, now)

    def _not_after(self, now: datetime, last: datetime) -> datetime:
        """The last start; where it lies in the future, for the clock was set back, the moment when that was noticed."""
        if last <= now:
            return last
        start, noticed = self._set_back or (last, now)
        self._set_back = last, (min(noticed, now) if start == last else now)
        return self._set_back[1]


def devices(placement: PlacementConfig) -> int:
    """Devices that work for a run: its GPUs, all that are visible where a role has none of its own, 1 without any."""
    roles = (placement.generator, placement.trainer, placement.reward)
    named = len({gpu for role in roles for gpu in role or ()})
    return (named if None not in roles else max(named, gpus.count())) or 1
