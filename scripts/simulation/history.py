"""One history: a service on a folder, killed and started again as its seed says, until it has finished what it has."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save
from sqlalchemy.exc import SQLAlchemyError

from selfplay.errors import InputError, SelfplayError
from selfplay.processes import children
from selfplay.service.daemon import Daemon
from selfplay.storage import hashes, seals
from selfplay.storage.lock import STATE, RunLock
from simulation.beginnings import Beginning, Folder, listed
from simulation.boundary import Configs, installed
from simulation.database import Database, empty, opened
from simulation.disk import REMOVE, Disk
from simulation.invariants import check
from simulation.taps import tapped
from simulation.threads import CLOCK
from simulation.world import Crash, Violation, World, plan_of

STARTS = 25  # of the service in one history
PATIENCE = 80  # looks at a service that has to finish, without faults
BEGINNINGS = 32  # folders that histories begin with
CONFIG = Path("selfplay.yaml")


class Line(SimpleNamespace):
    """As `selfplay.progress.Line`."""

    def __init__(self, shown: Display, **values: object) -> None:
        super().__init__(**values)
        self._shown = shown

    def update(self, **values: object) -> None:
        vars(self).update(values)
        self._shown.on_line(self)


class Display:
    """As `reporting.terminal.Display`, for nobody."""

    def __init__(self, world: World, after_round: Callable[[], None]) -> None:
        self._world, self._after_round = world, after_round
        self.on_line: Callable[[Any], None] = lambda line: None

    @contextlib.contextmanager
    def stage(self, round_index: int | None, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        line = Line(self, round_index=round_index, name=name, done=0, total=total, text="", unit=unit, seconds=0.0)
        self._world.tell(f"stage {name}")
        line.update()
        yield line

    def kept(self, round_index: int, name: str) -> None:
        self._world.tell(f"stage {name} is there")

    def note(self, text: str) -> None:
        self._world.tell(text)

    warn = note

    def round_table(self, report: object) -> None:
        self._after_round()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    seed: int
    error: str | None
    """Which invariant did not hold, or what nobody expected."""
    happened: dict[int, str]
    moments: int
    rounds: int
    starts: int

    @property
    def plan(self) -> str:
        return " ".join(f"{moment}={action}" for moment, action in sorted(self.happened.items()))


class Simulation:
    """Runs histories, one after another. Use it as a context manager: inside it the product is in the simulation."""

    def __init__(self, folder: Path) -> None:
        """`folder`: for the run folders, in memory where it is to be quick."""
        self._folder, self._model = folder, folder / "model"
        self._stack = contextlib.ExitStack()
        self._beginnings: dict[int, Beginning] = {}
        self._new = empty()
        self._nothing = Folder(waits="")
        self._empty = Beginning(ledger=opened(self._new), folder=self._nothing)
        self._configs: Configs

    def __enter__(self) -> Simulation:
        self._model.mkdir(parents=True)
        (self._model / "config.json").write_text("{}", encoding="utf-8")
        (self._model / "model.safetensors").write_bytes(save({"w": np.zeros(1, np.float32)}))
        self._configs = self._stack.enter_context(installed(self._model))
        self._stack.enter_context(tapped())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        REMOVE(self._folder, ignore_errors=True)

    def run(
        self, seed: int, plan: Mapping[int, str] | None = None, tell: Callable[[str], None] | None = None
    ) -> Outcome:
        """The history of a seed; with a `plan` that happens, and not what the seed says."""
        base = seed % BEGINNINGS
        if base not in self._beginnings:
            self._beginnings[base] = self._begin(base)
        root = self._folder / "run"
        world = World(seed, root, plan_of(seed) if plan is None else plan, tell)
        world.base = base
        self._configs.schedule = world.rng("schedule").choice([0, 0, 1, 2])
        self._configs.ahead = world.ahead
        history = History(world, self._beginnings[base])
        error = None
        try:
            history.run()
        except Violation as violation:
            error = str(violation)
        except Exception as unexpected:
            error = f"{type(unexpected).__name__}: {unexpected}"
            if tell is not None:
                tell(traceback.format_exc())
        finally:
            world.active = world.dead = False
            rounds = history.rounds()
            history.close()
        return Outcome(
            seed=seed, error=error, happened=world.happened, moments=world.moments, rounds=rounds, starts=history.starts
        )

    def _begin(self, base: int) -> Beginning:
        """A folder after some rounds and a part of another one; a few are empty."""
        world = World(base, self._folder / "run", {}, None)
        rng = world.rng("beginning")
        if not world.begun:
            return self._empty
        self._configs.schedule, self._configs.ahead = 0, world.ahead
        history = History(world, Beginning(ledger=opened(self._new), folder=self._nothing))
        left, more = rng.choice([0, 1, 1, 2, 2, 3]), rng.randint(1, 130)

        def after_round() -> None:
            nonlocal left
            left -= 1
            if left == -1:
                world.replan({world.moments + more: "kill"})

        if left == 0:
            world.replan({60 + more: "kill"})
        left -= 1
        history.after_round = after_round
        history.serve()
        kept = self._folder / f"beginning-{base}"
        shutil.copytree(world.root, kept, symlinks=True)
        # Histories begin with a copy. That its runner is gone is known where it was, and not in a copy.
        world.database.raw.execute("DELETE FROM state WHERE name = ?", (STATE,))
        ledger = opened(world.database.keep())
        folder = listed(kept, self._folder / f"waiting-{base}")
        history.close()
        return Beginning(ledger=ledger, folder=folder, now=world.now)


class History:
    """The service in one world."""

    def __init__(self, world: World, beginning: Beginning) -> None:
        self.world, self.starts, self._beginning = world, 0, beginning
        self.after_round: Callable[[], None] | None = None
        self._finished, self._looks, self._resumed = False, 0, 0
        beginning.lay(world.root)
        CLOCK.begin(world)
        _forgotten()
        world.now = beginning.now
        world.disk, world.database = Disk(world), Database(world, beginning.ledger)
        world.on_idle, world.second = self._look, self._second

    def run(self) -> None:
        """Raises Violation."""
        while not self._finished:
            self.starts += 1
            if self.starts > STARTS:
                raise Violation("the service does not finish, however often it is started")
            self.serve()
        with RunLock(self.world.root):
            pass
        check(self.world)

    def serve(self) -> None:
        """The service from one start to its end."""
        world = self.world
        world.start_process()
        world.tell(f"start {self.starts}")
        try:
            display: Any = Display(world, self.after_round or self._look)
            daemon = Daemon(CONFIG, [], world.root, display, clock=lambda: world.now)
            world.daemon = daemon
            daemon.serve()
            world.tell("the service has ended")
        except Crash:
            world.tell("the process is gone")
        except SelfplayError as error:
            if world.calm:
                raise Violation(f"the service does not start: {error}") from error
            world.tell(f"exit {error.exit_code}: {error}")
        finally:
            world.active = world.dead = False
            self._killed()
        self._look_without_service()

    def rounds(self) -> int:
        """Rounds in the ledger; 0 where none was made."""
        try:
            return self.world.database.outside.last_round()
        except (sqlite3.Error, SQLAlchemyError):
            return 0

    def close(self) -> None:
        world = self.world
        world.database.close()
        self._beginning.clear(world.root)
        del world.database, world.on_idle, world.second  # each of them knows the world

    def _killed(self) -> None:
        """What the kernel does when a process ends. What it had in mind goes with it: the circles in that are broken."""
        daemon, self.world.daemon = self.world.daemon, None
        if daemon is not None:
            for owner in (daemon.run, daemon):
                if owner is not None:
                    vars(owner).clear()
        for lock in self.world.locks:
            lock._close()
        self.world.locks.clear()
        children._running.clear()
        children.uncut()
        self.world.disk.forget()

    def _second(self) -> None:
        """Somebody starts another service in the same folder."""
        world = self.world
        if world.daemon is None or world.daemon._store is None:
            return
        other: Any = Display(world, lambda: None)
        second = Daemon(CONFIG, [], world.root, other, clock=lambda: world.now)
        try:
            second._open_ledger()
        except InputError:
            return
        raise Violation("two services run in one folder")

    # towards the end

    def _look(self) -> None:
        """Called where the service is idle, and after each round."""
        world = self.world
        if not world.calm:
            if world.moments < world.last:
                return
            self._calm()
        world.active = False
        try:
            self._settle()
        finally:
            world.active = True

    def _look_without_service(self) -> None:
        if self.world.moments >= self.world.last and not self.world.calm:
            self._calm()

    def _calm(self) -> None:
        """All faults are over. Sometimes another round is ordered."""
        world = self.world
        world.calm, world.full_until = True, 0
        world.tell("from here on nothing fails")

    def _settle(self) -> None:
        """End the history once the service has nothing to do, or waits for the next round."""
        world, store = self.world, self.world.database.outside
        self._looks += 1
        if self._looks > PATIENCE:
            raise Violation(f"the service does not finish: {world.daemon and world.daemon.progress}")
        if self._looks == 1 and world.rng("end").random() < (0.3 if world.ahead else 0.05):
            world.order("run")
        standing = store.standing(("pause", "run_now"))
        if standing.states.get("pause") and self._resumed < 5:
            opened = world.daemon is not None and world.daemon.run is not None
            idle = standing.open is None and standing.states.get("run_now", 0) <= store.last_round()
            if not (opened and idle):  # else it may stay paused
                self._resumed += 1
                world.order("resume")
                return
        if world.daemon is None or world.daemon.run is None:
            return
        done = store.last_round() >= standing.states.get("run_now", 0) or bool(standing.states.get("pause"))
        if standing.open is None and not standing.ordered and done:
            self._finished = True
            world.daemon.stop()


def _forgotten() -> None:
    """What a process keeps in mind, as when it begins: no history depends on what was done in the process before it."""
    hashes.forget()
    seals.repairs()
    children._heard = 0.0
    children._running.clear()
    children.uncut()
