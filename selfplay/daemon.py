"""The service: rounds on a schedule, orders between and within them, and a pause of its own when something is wrong.

One thread runs the rounds, so there are never two at a time; APScheduler's triggers say when the next one is due. All
that the service decides is in the ledger: what it is doing (state `service`), orders with what came of them, events.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import tenacity
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from selfplay import artifacts, children, orders, schedule
from selfplay.config import ScheduleConfig, load
from selfplay.display import Display, Line
from selfplay.errors import ConfigError, GuardError, InputError, Interrupted, SelfplayError
from selfplay.round import cancel_round, roll_back, run_round
from selfplay.run import Run
from selfplay.store import LedgerError, Store
from selfplay.types import RoundReport

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between two looks at the ledger for orders
STATE = "service"
LONGEST_WAIT = 3600.0  # seconds between two tries of a round, unless retry_seconds is more
CUT_SECONDS = 10.0  # from the end of all children to the end of a service that waits for something else still


def trigger(settings: ScheduleConfig, anchor: datetime) -> BaseTrigger:
    """What says when rounds are due; an interval counts from `anchor`. Raises ConfigError for a cron line that is none."""
    if settings.mode != "cron":
        seconds = round((settings.every_minutes or 0) * 60)
        return IntervalTrigger(seconds=seconds, start_date=anchor, timezone=settings.time_zone)
    try:
        minute, hour, day, month, weekday = (settings.cron or "").split()
        found: BaseTrigger = CronTrigger(
            minute=minute, hour=hour, day=day, month=month, day_of_week=schedule.weekdays(weekday), timezone=settings.time_zone
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"schedule.cron {settings.cron!r}: {error}", "minute hour day month weekday") from None
    if found.get_next_fire_time(None, anchor) is None:
        raise ConfigError(f"schedule.cron {settings.cron!r} never comes", "minute hour day month weekday")
    return found


def _due(source: BaseTrigger, since: datetime, settings: ScheduleConfig) -> datetime:
    """The first time at or after `since`, in UTC: arithmetic in a zone forgets which pass of a repeated hour it is in."""
    due = source.get_next_fire_time(None, since)
    if settings.cron is not None and due.fold and "*" not in settings.cron.split()[1]:
        due = source.get_next_fire_time(None, due.astimezone(UTC) + timedelta(seconds=1))  # it was due an hour before
    found: datetime = due.astimezone(UTC)
    return found


def next_start(
    settings: ScheduleConfig, last: datetime | None, up_since: datetime, now: datetime, jitter: float,
    ended: datetime | None = None,
) -> datetime:  # fmt: skip
    """When the next round may start; asked again later, the answer is the same until a round has started.

    last: when the last round started; up_since: when the service came up, which tells what was missed. Both count as now
    where they lie in the future (the clock was set back); for an answer that stays, the caller has to keep that moment.
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
        if due < up_since:  # it fell due while the service was down
            due = up_since if settings.missed == "once" else _due(source, up_since, settings)
    start = schedule.after_quiet_hours(due + timedelta(seconds=jitter * settings.jitter_seconds), settings)
    if start <= now and (later := schedule.after_quiet_hours(now, settings)) > now:
        return later  # overdue, and quiet hours have begun meanwhile
    return start


class Daemon:
    """Serves one run folder until it is told to stop. `start` … `run` … with `stop` from any thread or signal handler."""

    def __init__(
        self, config_path: Path, overrides: list[str], run_dir: Path | None, display: Display,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._path, self._overrides, self._clock, self._given_dir = config_path, overrides, clock, run_dir
        self.config = load(config_path, overrides)
        self.run_dir = run_dir or self.config.run_dir
        self.display = display
        self.up_since = clock()
        trigger(self.config.schedule, self.up_since)  # a cron line that is none is found now
        self.at_last: Callable[[], None] = lambda: None
        """Called where even the cut did not end the service; should end the process."""
        self._set_back: tuple[datetime, datetime] | None = None  # a start in the future, and when it was noticed
        self._stopping = threading.Event()
        self._in_round = False
        self._cut: threading.Timer | None = None
        self._polled = 0.0
        self._failures = 0
        self.progress: dict[str, Any] = {}
        display.on_line = self._on_line

    # --- from other threads and signal handlers ----------------------------------------------------------------------

    def stop(self) -> None:
        """Finish the shard, or save the trainer's state, and end; asked twice, or after `drain_seconds`, cut it short."""
        if self._stopping.is_set():
            self._cut_short()
            return
        self._stopping.set()
        self._later(self.config.service.drain_seconds, self._cut_short)

    def _cut_short(self) -> None:
        children.cut()
        self._later(CUT_SECONDS, self.at_last)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        if self._cut is not None:
            self._cut.cancel()
        self._cut = threading.Timer(seconds, what)
        self._cut.daemon = True
        self._cut.start()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run rounds until `stop`. Raises SelfplayError when the folder cannot be opened at all."""
        try:
            with contextlib.suppress(Interrupted):
                while not self._stopping.is_set():
                    if not self._opens():
                        continue
                    try:
                        self._serve_run()
                    except SelfplayError as error:  # while the folder was opened: a child of the import died, say
                        if error.exit_code == 2 or self._stopping.is_set():
                            raise
                        self.display.warn(f"{error}; trying again")
                        self._stopping.wait(min(self.config.service.retry_seconds, LONGEST_WAIT))
        finally:
            if self._cut is not None:
                self._cut.cancel()
            children.uncut()

    def _serve_run(self) -> None:
        """Open the folder and work in it until a stop."""
        with Run(self.config, self.run_dir, self.display) as run:
            self.run = run
            run.breathe = self._breathe
            self._note("event", "started", f"the service started (process {os.getpid()})")
            with contextlib.suppress(Interrupted):
                self._loop()
            if self._stopping.is_set():
                self._say("stopped", "")

    def _opens(self) -> bool:
        """Whether the ledger can be opened; else say so and wait a little: it may be locked, or its disk full."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            Store(self.run_dir).close()
        except (LedgerError, OSError) as error:
            self.display.warn(f"the ledger of {self.run_dir} cannot be opened, trying again: {error}")
            self._stopping.wait(10 * POLL_SECONDS)
            return False
        return True

    def _loop(self) -> None:
        self._failures = 0
        while not self._stopping.is_set():
            try:
                self._turn()
            except LedgerError as error:  # locked for long, or its disk is full: nothing can be decided without it
                self.display.warn(f"the ledger does not answer: {error.orig}")
                self._stopping.wait(POLL_SECONDS)
        self.run.stop_trainer()

    def _turn(self) -> None:
        """Obey orders; then a round if one is due, else a moment's wait."""
        self._between_rounds()
        why = self._why_not_now()
        if why is not None:
            self._say(*why)
            self._stopping.wait(POLL_SECONDS)
            return
        self._say("running", "")
        self._in_round = True
        try:
            try:
                report = run_round(self.run)
            except Interrupted as stop:
                self._interrupted(stop)
                return
        except Interrupted:  # the service was cut while it gave the round up
            raise
        except Exception as error:  # the boundary: a bug, too, is tried again, and then pauses the service
            if not self._stopping.is_set():
                self._failures += 1
                self._failed(error, self._failures)
        else:
            self._failures = 0
            self.display.round_table(report)
            self._after(report)
        finally:
            self._in_round = False

    def _why_not_now(self) -> tuple[str, str] | None:
        """State and reason for not starting (or going on with) a round at this moment."""
        store, now = self.run.store, self._clock()
        is_open = store.unfinished() is not None
        pause = store.state("pause")
        if pause and not (pause.get("after") == "round" and is_open):  # that one is finished first
            return "paused", pause["why"]
        longest = timedelta(seconds=max(LONGEST_WAIT, self.config.service.retry_seconds))
        if (retry := store.state("retry_at")) and now < datetime.fromisoformat(retry) <= now + longest:
            return "retrying", f"next try at {retry}"
        if is_open:
            return None
        finished = store.rounds()
        if len(finished) < store.state("run_now", 0):
            return None
        names = ("evaluate/reward", "generate/tokens")
        end = self.config.schedule.end
        asks = any(value is not None for value in end.model_dump().values())
        metrics = store.metrics_by_round(names) if asks else {}
        if reason := schedule.ended(end, finished, metrics, now, self.run.current.version, self._devices()):
            return "ended", reason
        last = self._not_after(now, datetime.fromisoformat(finished[-1]["started"])) if finished else None
        self.up_since = min(self.up_since, now)
        jitter = artifacts.seed(self.config.run.seed, "jitter", len(finished)) / 2**63
        ended = datetime.fromisoformat(finished[-1]["ended"]) if finished else None
        due = next_start(self.config.schedule, last, self.up_since, now, jitter, ended)
        return None if due <= now else ("waiting", due.isoformat(timespec="seconds"))

    def _not_after(self, now: datetime, last: datetime) -> datetime:
        """The last start; where it lies in the future, for the clock was set back, the moment when that was noticed."""
        if last <= now:
            return last
        start, noticed = self._set_back or (last, now)
        self._set_back = last, (min(noticed, now) if start == last else now)
        return self._set_back[1]

    def _devices(self) -> int:
        placement = self.config.placement
        return len({*(placement.generator or []), *(placement.trainer or []), *(placement.reward or [])}) or 1

    def _failed(self, error: Exception, failures: int) -> None:
        """Try the round again later, or pause and say why."""
        text = str(error) + (f"; what to do: {error.hint}" if isinstance(error, SelfplayError) and error.hint else "")
        if not isinstance(error, SelfplayError | LedgerError):
            text = f"{type(error).__name__}: {error} (see {self._write_traceback(error)})"
        self.display.warn(text)
        service = self.config.service
        # a wrong setting or input stays wrong, and so does a reward that is another one
        hopeless = getattr(error, "exit_code", 3) == 2 or isinstance(error.__cause__, GuardError)
        if hopeless or failures > service.retries:
            self.pause(f"a round failed {failures} time{'s' * (failures > 1)}: {text}")
            return
        wait = max(service.retry_seconds, min(service.retry_seconds * 2.0 ** min(failures - 1, 30), LONGEST_WAIT))
        self.run.store.set_state("retry_at", (self._clock() + timedelta(seconds=wait)).isoformat())
        self._note(
            "event",
            "warning",
            f"a round failed, trying again in {wait:.0f} s ({failures} of {service.retries}): {text}",
        )

    def _write_traceback(self, error: Exception) -> Path:
        log = self.run_dir / "logs" / "service.log"
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{self._clock().isoformat()} {''.join(traceback.format_exception(error))}\n")
        return log

    def _after(self, report: RoundReport) -> None:
        """Pause after so many rejected rounds in a row."""
        limit = self.config.service.pause_after_rejected
        states = [row["state"] for row in self.run.store.rounds()][-limit:]
        if report.outcome == "rejected" and states == ["rejected"] * limit:
            self.pause(f"{limit} rounds in a row were rejected, the last because: {'; '.join(report.reasons)}")

    def pause(self, why: str, alert: bool = True) -> None:
        self.run.store.set_state("pause", {"why": why, "time": self._clock().isoformat()})
        self.run.store.set_state("retry_at", None)
        if alert:
            self._note("alert", "alert", f"paused: {why}")

    # --- within a round ----------------------------------------------------------------------------------------------

    def _breathe(self, where: str) -> None:
        """Called between stages, shards and steps: raises Interrupted where an order or a stop wants the round to end."""
        if self._stopping.is_set():
            raise Interrupted("the service stops")
        if where != "stage" and time.monotonic() - self._polled < POLL_SECONDS:
            return
        self._polled = time.monotonic()
        with contextlib.suppress(LedgerError):  # a locked ledger delays an order, not the round
            for row in self.run.store.orders("pending"):
                if row["kind"] in ("pause", "resume", "cancel", "pin"):
                    self._obey(row)
            if where == "stage" and (self.run.store.state("pause") or {}).get("after") == "stage":
                raise Interrupted("paused after the stage")
            if self._is_cancelled():
                raise Interrupted("cancelled", now=True)

    def _is_cancelled(self) -> bool:
        """Whether the open round is to be given up; the state names it, so that no later one is taken for it."""
        is_open = self.run.store.unfinished()
        return is_open is not None and self.run.store.state("cancel") == is_open["round"]

    def _interrupted(self, stop: Interrupted) -> None:
        if self._is_cancelled():
            cancel_round(self.run)
            self._failures = 0
        self._note("event", "interrupted", str(stop))

    # --- orders ------------------------------------------------------------------------------------------------------

    def _between_rounds(self) -> None:
        for row in self.run.store.orders("pending"):
            if row["kind"] == "rollback" and self.run.store.unfinished() is not None:
                continue  # until the round that is open has ended
            self._obey(row)

    def _obey(self, row: dict[str, Any]) -> None:
        """Carry an order out and record what came of it."""
        try:
            result = self._carry_out(orders.parse(row["kind"], row["arguments"]))
        except (LedgerError, Interrupted):
            raise  # not obeyed yet: it stays pending
        except Exception as error:  # the boundary: an order that fails must not fail again at every start
            if self._stopping.is_set():
                return  # its children were ended under it
            text = str(error)
            if not isinstance(error, SelfplayError):
                text = f"{type(error).__name__}: {error} (see {self._write_traceback(error)})"
            self.run.store.answer(row["id"], "refused", text)
            self.display.warn(f"order {row['kind']} refused: {text}")
        else:
            self.run.store.answer(row["id"], "done", result)
            self.display.note(f"order {row['kind']}: {result}")

    def _carry_out(self, order: orders.Order) -> str:
        store = self.run.store
        match order:
            case orders.Pause():
                if order.after == "round" and not self._in_round and store.state("pause"):
                    return "is paused already"  # an open round is not to go on for this
                why = f"ordered, after the {order.after}"
                store.set_state("pause", {"why": why, "after": order.after, "time": self._clock().isoformat()})
                return f"pauses after the {order.after}"
            case orders.Resume():
                store.set_state("pause", None)
                store.set_state("retry_at", None)
                self._failures = 0
                return "goes on"
            case orders.RunNow():
                store.set_state("run_now", self.run.next_round)  # done once the run has so many
                return "a round starts now" if not store.state("pause") else "a round starts when the pause ends"
            case orders.Cancel():
                if (is_open := store.unfinished()) is None:
                    raise InputError("no round is open")
                if self._in_round:
                    store.set_state("cancel", is_open["round"])
                else:
                    cancel_round(self.run)
                    self._failures = 0
                return "the round is given up"
            case orders.Rollback():
                return roll_back(self.run, order.version)
            case orders.Pin():
                if order.pinned:
                    self.run.policy(order.version)  # its weights may have gone since the order was given
                store.pin(order.version, order.pinned)
                return f"policy {order.version} is {'pinned' if order.pinned else 'no longer pinned'}"
            case orders.AddPrompts():
                counts = self.run.add_prompts(order.rows, "order")
                return ", ".join(f"{n} {what}" for what, n in counts.items())
            case orders.Reload():
                return self._take_over()

    def _take_over(self) -> str:
        """Read the configuration file anew; what is not valid, or cannot change in this folder, is refused."""
        config = load(self._path, self._overrides)
        old, new = self.config.fixed(), config.fixed()
        if changed := [key for key in old if old[key] != new[key]]:
            raise InputError(f"{', '.join(changed)} cannot change within a run; the old configuration stays")
        served = ("host", "port", "token_env", "token_file")
        changed = [f"service.{k}" for k in served if getattr(config.service, k) != getattr(self.config.service, k)]
        if (self._given_dir or config.run_dir) != self.run_dir:
            changed = ["run.dir or run.name", *changed]
        if changed:
            raise InputError(f"{', '.join(changed)} cannot change while the service runs: stop it, then start it anew")
        if config == self.config:
            return "nothing changed"
        trigger(config.schedule, self._clock())
        self.run.reconfigure(config)
        self.config, self._failures = config, 0
        if (is_open := self.run.store.unfinished()) is not None:
            return f"the new configuration holds; round {is_open['round']} goes on with it"
        return "the new configuration holds from the next round on"

    # --- what it says ------------------------------------------------------------------------------------------------

    def _on_line(self, line: Line) -> None:
        self.progress |= {
            "round": line.round_index, "stage": line.name, "done": line.done, "total": line.total, "text": line.text,
            "unit": line.unit, "seconds": line.seconds,
        }  # fmt: skip

    def _say(self, state: str, why: str) -> None:
        """Keep state and reason in the ledger, where they changed."""
        if (state, why) != (self.progress.get("state"), self.progress.get("why")):
            self.progress |= {"state": state, "why": why}
            value = {"state": state, "why": why, "pid": os.getpid(), "since": self._clock().isoformat()}
            with contextlib.suppress(LedgerError):
                self.run.store.set_state(STATE, value)
            self.display.note(f"{state}{': ' if why else ''}{why}")

    def _note(self, how: str, kind: str, text: str) -> None:
        """An event; an alert goes to the webhook too."""
        with contextlib.suppress(LedgerError):
            self.run.store.event(kind, text)
        if how == "alert":
            self.display.warn(text)
            if url := os.environ.get(self.config.service.webhook_env):
                body = {"run": self.config.run.name, "kind": kind, "text": text, "time": self._clock().isoformat()}
                threading.Thread(target=post_alert, args=(url, body), daemon=True, name="webhook").start()


@tenacity.retry(
    stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random_exponential(max=60),
    retry=tenacity.retry_if_exception_type((httpx.HTTPError, httpx.InvalidURL)), retry_error_callback=lambda state: None,
)  # fmt: skip
def post_alert(url: str, body: dict[str, Any]) -> None:
    """Post an alert as JSON; five tries. The URL is a secret: it goes into no message."""
    try:
        httpx.post(url, json=body, timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("the webhook did not take an alert (%s)", type(error).__name__)
        raise


def handle_signals(daemon: Daemon) -> None:
    """SIGTERM and SIGINT stop the service, SIGHUP has it read its configuration anew."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())

    def reload(*_: object) -> None:
        threading.Thread(target=_submit_reload, args=(daemon.run_dir,), daemon=True).start()

    signal.signal(signal.SIGHUP, reload)


def _submit_reload(run_dir: Path) -> None:
    store = Store(run_dir)
    try:
        store.submit("reload", {}, "signal")
    finally:
        store.close()
