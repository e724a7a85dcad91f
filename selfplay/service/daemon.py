"""The service: rounds on a schedule, orders between and within them, and a pause of its own when something is wrong.

One thread runs the rounds, so there are never two at a time; APScheduler's triggers say when the next one is due. All
that the service decides is in the ledger: what it is doing (state `service`), orders with what came of them, events.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from selfplay import seeds
from selfplay.config import ScheduleConfig, load
from selfplay.errors import ConfigError, GuardError, InputError, Interrupted, SelfplayError
from selfplay.processes import children
from selfplay.processes.logs import bound_log
from selfplay.reporting.terminal import Display, Line
from selfplay.rounds.round import cancel_round, roll_back, run_round
from selfplay.rounds.run import Run
from selfplay.service import orders, schedule
from selfplay.service.alerts import Alerts
from selfplay.storage import tables
from selfplay.storage.ledger import LedgerError, RunLock, Store
from selfplay.storage.policies import Policies

POLL_SECONDS = 1.0  # between two looks at the ledger for orders
STATE = "service"
LONGEST_WAIT = 3600.0  # seconds between two tries of a round, unless retry_seconds is more
LOOK_SECONDS = 10.0  # between two looks for a stage that hangs
TELL_SECONDS = 10.0  # for terminal and ledger to take that one does: a disk that hangs takes nothing
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
    while settings.cron is not None and due.fold and "*" not in settings.cron.split()[1]:
        due = source.get_next_fire_time(None, due.astimezone(UTC) + timedelta(seconds=1))  # it was due an hour before
    found: datetime = due.astimezone(UTC)
    return found


def next_start(
    settings: ScheduleConfig, last: datetime | None, up_since: datetime, now: datetime, jitter: float,
    ended: datetime | None = None,
) -> datetime:  # fmt: skip
    """When the next round may start; asked again later, the answer is the same until a round has started.

    last: when the last round started (by cron, before the first: when the run was created); up_since: when the service came
    up, or its pause ended, which tells what was missed. Both count as now where they lie in the future (the clock was set
    back); for an answer that stays, the caller has to keep that moment.
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


class Daemon:
    """Serves one run folder until it is told to stop: `serve`, with `stop` from any thread or signal handler.

    What fails, wherever it fails, is tried again with back-off, and then the service pauses itself. The ledger may be what
    fails: a pause and an alert hold from the moment that they are decided, and are written down once it takes them.
    """

    def __init__(
        self, config_path: Path, overrides: list[str], run_dir: Path | None, display: Display,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:  # fmt: skip
        self._path, self._overrides, self._clock, self._given_dir = config_path, overrides, clock, run_dir
        self.config = load(config_path, overrides)
        self.run_dir = run_dir or self.config.run_dir
        self.display = display
        self.up_since = clock()
        """Since when rounds can start: what fell due before was missed."""
        trigger(self.config.schedule, self.up_since)  # a cron line that is none is found now
        self.at_last: Callable[[], None] = lambda: None
        """Called where even the cut did not end the service; should end the process."""
        self.run: Run | None = None
        self._store: Store | None = None
        self._lock: RunLock | None = None
        self._set_back: tuple[datetime, datetime] | None = None  # a start in the future, and when it was noticed
        self._stopping = threading.Event()
        self._reloading = False  # SIGHUP came, and is not in the ledger yet
        self._alerts = Alerts(lambda: os.environ.get(self.config.service.webhook_env), self._stopping)
        self._in_round = False
        self._cut: threading.Timer | None = None
        self._polled = 0.0
        self._moved = time.monotonic()  # when the loop, or the stage in it, last got on
        self._stalls = 0  # since it got on
        self._failures = 0  # in a row
        self._retry_at: datetime | None = None
        self._pause: dict[str, Any] | None = None  # of its own, while it is not in the ledger
        self._told: tuple[str, str] | None = None  # state and reason in the ledger
        self.progress: dict[str, Any] = {}
        display.on_line = self._on_line

    @property
    def store(self) -> Store:
        assert self._store is not None, "the ledger is open"
        return self._store

    # --- from other threads and signal handlers ----------------------------------------------------------------------

    def stop(self) -> None:
        """Finish the shard, or save the trainer's state, and end; asked twice, or after `drain_seconds`, cut it short."""
        if self._stopping.is_set():
            self._cut_short()
            return
        self._stopping.set()
        self._later(self.config.service.drain_seconds, self._cut_short)

    def reload(self) -> None:
        """Order that the configuration file is read anew."""
        self._reloading = True

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
        """Run rounds until `stop`. Raises InputError or ConfigError for a folder or a configuration that cannot be used."""
        threading.Thread(target=self._watch, name="stalls", daemon=True).start()
        try:
            with contextlib.suppress(Interrupted):
                while not self._stopping.is_set():
                    self._turn()
            if self._store is not None:
                with contextlib.suppress(LedgerError):
                    self._write_down()
            self._say("stopped", "")
        finally:
            if self.run is not None:
                self.run.__exit__()
            if self._store is not None:
                self._store.close()
            if self._lock is not None:
                self._lock.__exit__()
            if self._cut is not None:
                self._cut.cancel()
            children.uncut()

    def _turn(self) -> None:
        """One step of the loop, and the boundary around it: a bug, too, is tried again, and then pauses the service."""
        self._get_on()
        try:
            self._step()
        except Interrupted:  # the service was cut
            raise
        except Exception as error:
            if self._stopping.is_set():
                return  # its children were ended under it
            if self.run is None and getattr(error, "exit_code", 3) == 2:
                raise
            if (held := self._held()) is None:
                self._failed(error)
            else:  # what failed before fails still
                self._say(*held)
                self._stopping.wait(POLL_SECONDS)
        finally:
            self._in_round = False

    def _step(self) -> None:
        """Obey orders; then a round if one is due, else a moment's wait."""
        self._open_ledger()
        self._write_down()
        self._between_rounds()
        why = self._why_not_now()
        waits = self._failures and why is not None and why[0] in ("paused", "retrying")
        if self.run is None and not waits:  # at a start whatever the schedule says: orders need it
            self._open_run()
            return
        if why is not None:
            if why[0] in ("waiting", "ended"):
                self._fresh()
            self._say(*why)
            self._stopping.wait(POLL_SECONDS)
            return
        assert self.run is not None
        self._say("running", "")
        self._in_round = True
        try:
            report = run_round(self.run)
        except Interrupted as stop:
            self._interrupted(stop)
            return
        self._fresh()
        self.display.round_table(report)
        tables.give_back_memory()

    def _open_ledger(self) -> None:
        if self._store is None:
            if self._lock is None:  # before anything is read or written there: the folder may be another service's
                self._lock = RunLock(self.run_dir).__enter__()
            store = Store(self.run_dir)
            self._alerts.load(store)
            self._store = store

    def _write_down(self) -> None:
        """What the ledger could not take when it was decided, and what changed since."""
        if self._pause is not None:
            self.store.set_state("pause", self._pause)
            self.store.event("alert", f"paused: {self._pause['why']}")  # last: done again, it would be there twice
            self._pause = None
        self._alerts.keep(self.store)
        if self._reloading:
            self.store.submit("reload", {}, "signal")
            self._reloading = False

    def _open_run(self) -> None:
        run = Run(self.config, self.run_dir, self.display, self._lock)
        run.breathe = self._breathe
        self.run = run.__enter__()
        self._fresh()
        self.store.event("started", f"the service started (process {os.getpid()})")

    def _held(self) -> tuple[str, str] | None:
        """State and reason while what failed waits for its next try, or for a person."""
        if self._pause is not None:
            return "paused", self._pause["why"]
        longest = timedelta(seconds=max(LONGEST_WAIT, self.config.service.retry_seconds))
        if self._retry_at is not None and (now := self._clock()) < self._retry_at <= now + longest:
            return "retrying", f"next try at {self._retry_at.isoformat(timespec='seconds')}"
        return None

    def _fresh(self) -> None:
        """Nothing fails any more, or a person said to try again."""
        self._failures, self._retry_at = 0, None

    def _why_not_now(self) -> tuple[str, str] | None:
        """State and reason for not starting (or going on with) a round at this moment."""
        store, now = self.store, self._clock()
        is_open = store.unfinished() is not None
        pause = store.state("pause")
        if pause and not (pause.get("after") == "round" and is_open):  # that one is finished first
            self.up_since = now
            return "paused", pause["why"]
        if (held := self._held()) is not None or is_open:
            return held
        finished, schedule_ = store.rounds(), self.config.schedule
        if (why := self._rejected(finished)) is not None:
            self.pause("rejected", why)
            return "paused", why
        if len(finished) < store.state("run_now", 0):
            return None
        if reason := self._ended(finished, now):
            return "ended", reason
        start = finished[-1]["started"] if finished else store.created() if schedule_.cron is not None else None
        last = None if start is None else self._not_after(now, datetime.fromisoformat(start))
        self.up_since = min(self.up_since, now)
        jitter = seeds.derive(self.config.run.seed, "jitter", len(finished)) / 2**63
        ended = datetime.fromisoformat(finished[-1]["ended"]) if finished else None
        due = next_start(schedule_, last, self.up_since, now, jitter, ended)
        return None if due <= now else ("waiting", due.isoformat(timespec="seconds"))

    def _ended(self, finished: list[dict[str, Any]], now: datetime) -> str | None:
        """Why the schedule has no further round, or None."""
        end, store = self.config.schedule.end, self.store
        if all(value is None for value in end.model_dump().values()):
            return None
        metrics = store.metrics_by_round(("evaluate/reward", *schedule.TOKENS))
        current = Policies(self.run_dir).current or 0
        return schedule.ended(end, finished, metrics, now, current, store.spent() * self._devices())

    def _rejected(self, finished: list[dict[str, Any]]) -> str | None:
        """Why rejected rounds pause the service, unless a person resumed it after the last of them."""
        limit = self.config.service.pause_after_rejected
        last = finished[-limit:]
        in_a_row = [row["state"] for row in last] == ["rejected"] * limit
        if not in_a_row or last[-1]["round"] <= self.store.state("resumed", 0):
            return None
        return f"{limit} rounds in a row were rejected, the last because: {'; '.join(last[-1]['reasons'])}"

    def _not_after(self, now: datetime, last: datetime) -> datetime:
        """The last start; where it lies in the future, for the clock was set back, the moment when that was noticed."""
        if last <= now:
            return last
        start, noticed = self._set_back or (last, now)
        self._set_back = last, (min(noticed, now) if start == last else now)
        return self._set_back[1]

    def _devices(self) -> int:
        placement = self.config.placement
        roles = (placement.generator, placement.trainer, placement.reward)
        named = len({gpu for role in roles for gpu in role or ()})
        return (named if None not in roles else max(named, _visible_gpus())) or 1

    def _failed(self, error: Exception) -> None:
        """Try again later, or pause and say why."""
        self._failures += 1
        if isinstance(error, LedgerError):
            text = f"the ledger does not answer: {error.orig}"
        elif isinstance(error, SelfplayError):
            text = f"{error}; what to do: {error.hint}" if error.hint else str(error)
        else:
            text = f"{type(error).__name__}: {error} (see {self._write_traceback(error)})"
        text = text.encode("utf-8", "backslashreplace").decode()  # terminal and ledger take no lone surrogate
        service, what = self.config.service, "a round" if self._in_round else "the service"
        # a wrong setting or input stays wrong, and so does a reward that is another one
        hopeless = getattr(error, "exit_code", 3) == 2 or isinstance(error.__cause__, GuardError)
        if hopeless or self._failures > service.retries:
            self.pause("failed", f"{what} failed {self._failures} time{'s' * (self._failures > 1)}: {text}")
            return
        wait = service.retry_seconds * 2.0 ** min(self._failures - 1, 30)
        wait = max(service.retry_seconds, min(wait, LONGEST_WAIT))
        self._retry_at = self._clock() + timedelta(seconds=wait)
        said = f"{what} failed, trying again in {wait:.0f} s ({self._failures} of {service.retries}): {text}"
        self._warn("warning", said)

    def _write_traceback(self, error: Exception) -> Path:
        log = self.run_dir / "logs" / "service.log"
        with contextlib.suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            bound_log(log)
            with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{self._clock().isoformat()} {''.join(traceback.format_exception(error))}\n")
        return log

    def pause(self, kind: str, why: str) -> None:
        """Pause by itself, and say why: to people first, for the ledger may be what is wrong. kind: failed, rejected."""
        time = self._clock().isoformat()
        self._retry_at = None
        self._pause = {"why": why, "kind": kind, "time": time}
        self.display.warn(f"paused: {why}")
        self._alert(f"paused: {why}")
        if self._store is not None:
            with contextlib.suppress(LedgerError):
                self._write_down()

    # --- a stage that hangs ------------------------------------------------------------------------------------------

    def _get_on(self) -> None:
        self._moved, self._stalls = time.monotonic(), 0

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            self._look_for_a_stall()

    def _look_for_a_stall(self) -> None:
        """End all children where nothing has got on for too long: who waits for one finds it dead, and that is tried again.

        Where even that moves nothing it is not a child that hangs, but a disk, a tracker or a function of the user's:
        people are told.
        """
        config = self.config
        limit = max(config.service.stall_hours * 3600, config.train.silence, config.generate.engine.silence)
        quiet = time.monotonic() - max(self._moved, children.heard())
        if quiet < limit:
            return
        self._moved, self._stalls = time.monotonic(), self._stalls + 1
        what = f"stage {self.progress.get('stage')}" if self._in_round else "the service"
        text = f"{what} has not got on for {quiet / 3600:.1f} h (service.stall_hours)"
        if self._stalls == 1:
            kind, text = "stalled", f"{text}: its processes are ended, and what they did is tried again"
        else:
            text += f", though its processes were ended: {self.run_dir}, or what the configuration names, hangs; restart the service"
            kind = "alert"
        telling = threading.Thread(target=self._warn, args=(kind, text), daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)
        if kind == "alert":
            self._alert(text)
        children.end_running()

    # --- within a round ----------------------------------------------------------------------------------------------

    def _breathe(self, where: str) -> None:
        """Called between stages, shards and steps: raises Interrupted where an order or a stop wants the round to end."""
        if self._stopping.is_set():
            raise Interrupted("the service stops")
        if where != "stage" and time.monotonic() - self._polled < POLL_SECONDS:
            return
        self._polled = time.monotonic()
        with contextlib.suppress(LedgerError):  # a locked ledger delays an order, not the round
            self._write_down()
            for row in self.store.pending(("pause", "resume", "cancel", "pin")):
                self._obey(row["id"])
            if where == "stage" and (self.store.state("pause") or {}).get("after") == "stage":
                raise Interrupted("paused after the stage")
            if self._is_cancelled():
                raise Interrupted("cancelled", now=True)

    def _is_cancelled(self) -> bool:
        """Whether the open round is to be given up; the state names it, so that no later one is taken for it."""
        is_open = self.store.unfinished()
        return is_open is not None and self.store.state("cancel") == is_open["round"]

    def _interrupted(self, stop: Interrupted) -> None:
        if self._is_cancelled():
            assert self.run is not None
            cancel_round(self.run)
            self._fresh()
        self._event("interrupted", str(stop))

    # --- orders ------------------------------------------------------------------------------------------------------

    def _between_rounds(self) -> None:
        is_open = self.store.unfinished() is not None
        for row in self.store.pending(() if self.run is not None else ("pause", "resume", "reload")):
            if row["kind"] == "rollback" and is_open:
                continue  # until the round that is open has ended
            self._obey(row["id"])

    def _obey(self, number: int) -> None:
        """Carry an order out and record what came of it."""
        row = self.store.order(number)
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
            self.store.answer(row["id"], "refused", text)
            self.display.warn(f"order {row['kind']} refused: {text}")
        else:
            self.store.answer(row["id"], "done", result)
            self.display.note(f"order {row['kind']}: {result}")

    def _carry_out(self, order: orders.Order) -> str:
        store = self.store
        match order:
            case orders.Pause():
                if order.after == "round" and not self._in_round and store.state("pause"):
                    return "is paused already"  # an open round is not to go on for this
                why = f"ordered, after the {order.after}"
                time = self._clock().isoformat()
                store.set_state("pause", {"why": why, "kind": "ordered", "after": order.after, "time": time})
                return f"pauses after the {order.after}"
            case orders.Resume():
                rounds = [row["round"] for row in store.rounds() if row["state"] != "running"]
                store.set_state("resumed", max(rounds, default=0))
                store.set_state("pause", None)
                self._fresh()
                return "goes on"
            case orders.Reload():
                return self._take_over()
        assert self.run is not None, "the others wait until the run is open"
        match order:
            case orders.RunNow():
                store.set_state("run_now", self.run.next_round)  # done once the run has so many
                self._fresh()
                return "a round starts now" if not store.state("pause") else "a round starts when the pause ends"
            case orders.Cancel():
                if (is_open := store.unfinished()) is None:
                    raise InputError("no round is open")
                if self._in_round:
                    store.set_state("cancel", is_open["round"])
                else:
                    cancel_round(self.run)
                    self._fresh()
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

    def _take_over(self) -> str:
        """Read the configuration file anew; what is not valid, or cannot change in this folder, is refused."""
        config = load(self._path, self._overrides)
        old, new = self.config.fixed(), config.fixed()
        if changed := [key for key in old if old[key] != new[key]]:
            raise InputError(f"{', '.join(changed)} cannot change within a run; the old configuration stays")
        served = ("host", "port", "hosts", "token_env", "token_file")
        changed = [f"service.{k}" for k in served if getattr(config.service, k) != getattr(self.config.service, k)]
        if (self._given_dir or config.run_dir) != self.run_dir:
            changed = ["run.dir or run.name", *changed]
        if changed:
            raise InputError(f"{', '.join(changed)} cannot change while the service runs: stop it, then start it anew")
        if config == self.config:
            return "nothing changed"
        trigger(config.schedule, self._clock())
        if self.run is not None:
            self.run.reconfigure(config)
        else:
            Run(config, self.run_dir, self.display).require()
        self.config = config
        self._fresh()
        if (is_open := self.store.unfinished()) is not None:
            return f"the new configuration holds; round {is_open['round']} goes on with it"
        return "the new configuration holds from the next round on"

    # --- what it says ------------------------------------------------------------------------------------------------

    def _on_line(self, line: Line) -> None:
        self._get_on()
        self.progress |= {
            "round": line.round_index, "stage": line.name, "done": line.done, "total": line.total, "text": line.text,
            "unit": line.unit, "seconds": line.seconds,
        }  # fmt: skip

    def _say(self, state: str, why: str) -> None:
        """Tell state and reason where they changed: page and terminal, and the ledger once it takes them."""
        if (state, why) != (self.progress.get("state"), self.progress.get("why")):
            self.progress |= {"state": state, "why": why, "since": self._clock().isoformat()}
            self.display.note(f"{state}{': ' if why else ''}{why}")
        if self._store is not None and self._told != (state, why):
            with contextlib.suppress(LedgerError):
                said = {name: self.progress[name] for name in ("state", "why", "since")}
                self._store.set_state(STATE, {**said, "pid": os.getpid()})
                self._told = (state, why)

    def _alert(self, text: str) -> None:
        time = self._clock().isoformat()
        self._alerts.send({"run": self.config.run.name, "kind": "alert", "text": text, "time": time})

    def _warn(self, kind: str, text: str) -> None:
        """Show a person, and record an event."""
        self.display.warn(text)
        self._event(kind, text)

    def _event(self, kind: str, text: str) -> None:
        if self._store is not None:
            with contextlib.suppress(LedgerError):
                self._store.event(kind, text)


def _visible_gpus() -> int:
    """GPUs that this process and its children may use, as far as that can be told without their driver."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return sum(name.strip() not in ("", "-1") for name in listed.split(","))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def handle_signals(daemon: Daemon) -> None:
    """SIGTERM and SIGINT stop the service, SIGHUP has it read its configuration anew.

    The stop is another thread's: it takes locks, which the thread that is interrupted here may hold.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=daemon.stop).start())
    signal.signal(signal.SIGHUP, lambda *_: daemon.reload())
