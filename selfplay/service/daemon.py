"""The service: rounds on a schedule, orders between and within them, and a pause of its own when something is wrong.

One thread runs the rounds, so there are never two at a time. All that the service decides is in the ledger: what it is doing
(state `service`), orders with what came of them, events.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from selfplay.config import load
from selfplay.errors import InputError, Interrupted, LockLost, SelfplayError
from selfplay.progress import Line
from selfplay.reporting.terminal import Display
from selfplay.rounds.round import cancel_round, publish_current, roll_back, run_round
from selfplay.rounds.run import Run
from selfplay.service import failures, no_progress, orders
from selfplay.service.alerts import Alerts
from selfplay.service.due import trigger
from selfplay.service.failures import Failures
from selfplay.service.reload import read_anew
from selfplay.service.stalls import Stalls, longest_quiet
from selfplay.service.starts import Starts
from selfplay.service.stop import Stop
from selfplay.storage import folders, tables
from selfplay.storage.ledger import LedgerError, Store
from selfplay.storage.lock import RunLock
from selfplay.storage.reader import CANCEL, Standing

POLL_SECONDS = 1.0  # between two looks at the ledger for orders
STATE = "service"
ASKED = ("pause", "resumed", "run_now")  # what orders left in the ledger that decides on the next round


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
        self._starts = Starts(clock())
        trigger(self.config.schedule, clock())  # a cron line that is none is found now
        self.run: Run | None = None
        self._store: Store | None = None
        self._lock: RunLock | None = None
        self._stop = Stop()
        self._stopping = self._stop.asked
        self._reloading = False  # SIGHUP came, and is not in the ledger yet
        self._alerts = Alerts.of(lambda: self.config.service, self._stopping)
        self._in_round = False
        self._polled = 0.0
        self._stalls = Stalls(
            limit=lambda: longest_quiet(self.config), tell=self._warn, alert=self._alert,
            what=lambda: f"stage {self.progress.get('stage')}" if self._in_round else "the service",
            elsewhere=f"{self.run_dir}, or what the configuration names,",
        )  # fmt: skip
        self._failures = Failures()
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
        self._stop.ask(self.config.service.drain_seconds)

    def end_with(self, at_last: Callable[[], None]) -> None:
        """Have `at_last` end the process where even the cut did not end the service."""
        self._stop.at_last = at_last

    def reload(self) -> None:
        """Order that the configuration file is read anew."""
        self._reloading = True

    # --- the loop ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Run rounds until `stop`. Raises InputError or ConfigError for a folder or a configuration that cannot be used."""
        threading.Thread(target=self._stalls.watch, args=(self._stopping,), name="stalls", daemon=True).start()
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
            self._stop.done()

    def _turn(self) -> None:
        """One step of the loop, and the boundary around it: a bug, too, is tried again, and then pauses the service."""
        self._stalls.get_on()
        try:
            with folders.disk_errors(self.run_dir / "run"):
                self._step()
        except (Interrupted, LockLost):  # the service was cut, or the folder is another one's now
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
        why = self._why_not_now(self._between_rounds())
        waits = self._failures.count and why is not None and why[0] in ("paused", "retrying")
        if self.run is None and not waits:  # at a start whatever the schedule says: orders need it
            self._open_run()
            return
        if why is not None:
            if why[0] in ("waiting", "ended"):
                self._failures.forget()
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
        self._failures.forget()
        self.display.round_table(report)
        tables.give_back_memory()

    def _open_ledger(self) -> None:
        if self._store is None:
            if self._lock is None:  # before anything is read or written there: the folder may be another service's
                self._lock = RunLock.of(self.config.run, self.run_dir, self.display.note).__enter__()
            store = Store(self.run_dir, self._lock)
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
        if self._failures.count:  # somebody may have put another ledger there since
            before, self._store = self.store, Store(self.run_dir, self._lock)
            before.close()
        run = Run(self.config, self.run_dir, self.display, self._lock, self.store)
        run.breathe, run.alert = self._breathe, self._alert
        self.run = run.__enter__()
        self._failures.forget()
        self.store.event("started", f"the service started (process {os.getpid()})")
        publish_current(self.run, retry=True)

    def _held(self) -> tuple[str, str] | None:
        """State and reason while what failed waits for its next try, or for a person."""
        if self._pause is not None:
            return "paused", self._pause["why"]
        if (due := self._failures.next_try(self.config.service, self._clock())) is not None:
            return "retrying", f"next try at {due.isoformat(timespec='seconds')}"
        return None

    def _why_not_now(self, standing: Standing) -> tuple[str, str] | None:
        """State and reason for not starting (or going on with) a round at this moment."""
        store, now = self.store, self._clock()
        is_open, said = standing.open is not None, standing.states
        pause = said.get("pause")
        if pause and not (pause.get("after") == "round" and is_open):  # that one is finished first
            self._starts.up_since = now
            return "paused", pause["why"]
        if (held := self._held()) is not None or is_open:
            return held
        limit = self.config.service.pause_after_rejected
        rounds = store.last_rounds(limit)
        if (stuck := no_progress.why_pause(rounds, limit, said.get("resumed", 0), store.metrics)) is not None:
            self.pause(*stuck)
            return "paused", stuck[1]
        last = rounds[-1] if rounds else None
        if (last["round"] if last else 0) < said.get("run_now", 0):
            return None
        return self._starts.why_not(self.config, store, last, now)

    def _failed(self, error: Exception) -> None:
        """Try again later, or pause and say why."""
        text, service = failures.in_words(error, self.run_dir, self._clock()), self.config.service
        what = "a round" if self._in_round else "the service"
        wait, count = self._failures.add(error, service, self._clock()), self._failures.count
        if wait is None:
            self.pause("failed", f"{what} failed {count} time{'s' * (count > 1)}: {text}")
        else:
            said = f"{what} failed, trying again in {wait:.0f} s ({count} of {service.retries}): {text}"
            self._warn("warning", said)

    def pause(self, kind: str, why: str) -> None:
        """Pause by itself, and say why: to people first, for the ledger may be what is wrong. kind: failed, rejected, skipped."""
        time = self._clock().isoformat()
        self._failures.give_up() if kind == "failed" else self._failures.forget()
        self._pause = {"why": why, "kind": kind, "time": time}
        self.display.warn(f"paused: {why}")
        self._alert(f"paused: {why}")
        if self._store is not None:
            with contextlib.suppress(LedgerError):
                self._write_down()

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
            standing = self.store.standing(orders.WITHIN)
            if standing.ordered:
                for row in self.store.pending(("pause", "resume", "cancel", "pin")):
                    self._obey(row["id"])
                standing = self.store.standing(orders.WITHIN)
            if where == "stage" and (standing.states.get("pause") or {}).get("after") == "stage":
                raise Interrupted("paused after the stage")
            if orders.is_cancelled(standing):
                raise Interrupted("cancelled", now=True)

    def _interrupted(self, stop: Interrupted) -> None:
        if orders.is_cancelled(self.store.standing(orders.WITHIN)):
            assert self.run is not None
            cancel_round(self.run)
            self._failures.forget()
        self._event("interrupted", str(stop))

    # --- orders ------------------------------------------------------------------------------------------------------

    def _between_rounds(self) -> Standing:
        """Obey the orders that wait. Returns where the run stands then."""
        standing = self.store.standing(ASKED)
        if not standing.ordered:
            return standing
        for row in self.store.pending(() if self.run is not None else ("pause", "resume", "reload")):
            if row["kind"] == "rollback" and standing.open is not None:
                continue  # until the round that is open has ended
            self._obey(row["id"])
        return self.store.standing(ASKED)

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
                log = failures.write_traceback(error, self.run_dir, self._clock())
                text = f"{type(error).__name__}: {error} (see {log})"
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
                is_open = store.unfinished()
                store.set_state("resumed", store.last_round() if is_open is None else is_open["round"] - 1)
                store.set_state("pause", None)
                self._failures.forget()
                return "goes on"
            case orders.Reload():
                return self._take_over()
        assert self.run is not None, "the others wait until the run is open"
        match order:
            case orders.RunNow():
                store.set_state("run_now", self.run.next_round)  # done once the run has so many
                self._failures.forget()
                return "a round starts now" if not store.state("pause") else "a round starts when the pause ends"
            case orders.Cancel():
                if (is_open := store.unfinished()) is None:
                    raise InputError("no round is open")
                if self._in_round:
                    store.set_state(CANCEL, is_open["round"])
                else:
                    cancel_round(self.run)
                    self._failures.forget()
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
        config = read_anew(self._path, self._overrides, self.config, self.run_dir, self._given_dir, self._clock())
        if config == self.config:
            return "nothing changed"
        if self.run is not None:
            self.run.reconfigure(config)
        else:
            Run(config, self.run_dir, self.display).require()
        self.config = config
        self._failures.forget()
        if (is_open := self.store.unfinished()) is not None:
            return f"the new configuration holds; round {is_open['round']} goes on with it"
        return "the new configuration holds from the next round on"

    # --- what it says ------------------------------------------------------------------------------------------------

    def _on_line(self, line: Line) -> None:
        self._stalls.get_on()
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
