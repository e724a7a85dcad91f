"""What surrounds the service in a history: its clock, the faults, and people and processes outside."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfplay.errors import InputError, SelfplayError
from selfplay.service import orders

if TYPE_CHECKING:
    from selfplay.service.daemon import Daemon
    from selfplay.storage.lock import RunLock
    from simulation.database import Database
    from simulation.disk import Disk

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
LONGEST = 6000  # moments of a history; one of more does not get on
FULL = 12  # writes that a full disk refuses before there is space again
POLL = (
    300.0  # virtual seconds for which the waiting service sleeps: of all its polls, those that see nothing are left out
)

ORDERS = ("run", "pause", "resume", "cancel", "rollback", "pin", "add_prompts", "reload")
OUTSIDE = (*(f"order-{kind}" for kind in ORDERS), "stop", "second", "jump")
"""What others do while the service works or waits."""
ACTIONS: Mapping[str, tuple[str, ...]] = {
    "write": ("kill", "kill", "power", "power", "full"),
    "delete": ("kill", "power"),
    "commit": ("kill", "kill", "power", "full", "locked"),
    "read": ("kill", "locked", *OUTSIDE),
    "child": ("kill", "die", "hang", *OUTSIDE),
    "idle": ("kill", *OUTSIDE),
}
"""What may happen at a moment of each kind."""
ANY = "?"
"""In a plan: one of those that may happen at that moment, as the seed says."""


class Crash(BaseException):
    """The process of the service is gone: nothing that it does from here on has an effect."""


class Violation(BaseException):
    """An invariant does not hold. Nothing in the service catches it."""


class World:
    """One history: `plan` says what happens at which of its moments, a number → an action."""

    def __init__(self, seed: int, root: Path, plan: Mapping[int, str], tell: Callable[[str], None] | None) -> None:
        self.seed, self.root, self._tell = seed, root, tell
        self.replan(plan)
        self.base = seed
        """What rounds come to follows from it."""
        self.moments = 0
        self.active = False
        """Whether the service works: what the simulation itself does is no moment."""
        self.dead = False
        self.now, self.monotonic = NOON, 0.0
        self.jumped = False
        self.locks: list[RunLock] = []
        """Those that somebody tried to take."""
        self.opened: dict[int, float] = {}
        """When each round began, by the clock of intervals."""
        self.by_order: set[int] = set()
        """Rounds that began because somebody ordered one."""
        self.promised: dict[int, int] = {}
        """Orders for a round that were obeyed, and the round that each of them gets."""
        self.weights: dict[int, str | None] = {}
        """Those of each policy that were looked at when the history had ended."""
        self.files: dict[Path, Any] = {}
        """What is in files that were read when the history had ended."""
        self.happened: dict[int, str] = {}
        self.calm = False
        """Whether all faults are over, and the service has to finish what it has."""
        self.full_until = 0
        self.daemon: Daemon | None = None
        self.variant = 0
        """Which of the configurations the file has now."""
        self.on_idle: Callable[[], None] = lambda: None
        self.second: Callable[[], None] = lambda: None
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self.disk: Disk
        self.database: Database

    def replan(self, plan: Mapping[int, str]) -> None:
        """Have other things happen from here on."""
        self.plan, self.last = plan, max(plan, default=0)  # after the last of them nothing is lost any more

    def tell(self, text: str) -> None:
        if self._tell is not None:
            self._tell(f"{self.moments:5} {self.now:%d %H:%M:%S}  {text}")

    def rng(self, *of: object) -> random.Random:
        """Chances of one thing, whatever else happens in the history."""
        return random.Random(f"{self.seed} {' '.join(map(str, of))}")

    @property
    def begun(self) -> bool:
        """Whether the history begins with a folder in which a service has worked."""
        return self.base > 1

    @property
    def ahead(self) -> bool:
        """Whether rounds are sampled ahead, until somebody edits the configuration."""
        return self.base % 4 == 1

    # moments

    def moment(self, kind: str, what: object) -> str | None:
        """The service does something: «write», «delete» and «commit» are about to be done, «read» is a look at the ledger, «child» a wait for
        a child and «idle» one for nothing. Raises Crash where it ends here. Returns what a fault does to a child, if anything."""
        if self.dead:
            raise Crash
        if not self.active:
            return None
        self.moments += 1
        action = self.plan.get(self.moments)
        if action == ANY:
            action = self.rng(self.moments, kind).choice(ACTIONS[kind])
        if action is not None and not self.calm and action in ACTIONS[kind]:
            self.happened[self.moments] = action
            self.tell(f"{kind} {what}: {action.upper()}")
            self.active = False
            try:
                return self._act(action, kind)
            finally:
                self.active = not self.dead
        if self.moments > LONGEST:
            raise Violation("the history does not end")
        if self.moments < self.full_until and kind in ("write", "commit"):
            self.refuse(kind)
        return None

    def _act(self, action: str, kind: str) -> str | None:
        if action in ("kill", "power"):
            self.dead = True
            if action == "power":
                self.disk.lose(self.rng(self.moments, "power"))
            raise Crash
        if action == "full":
            self.full_until = self.moments + FULL
            self.refuse(kind)
        if action == "locked":
            self.database.refuse("database is locked")
        if action == "stop" and self.daemon is not None:
            self.daemon.stop()
        elif action == "second":
            self.second()
        elif action == "jump":
            self.jump()
        elif action.startswith("order-"):
            self.order(action.removeprefix("order-"))
        return action if action in ("die", "hang") else None

    def refuse(self, kind: str) -> None:
        if kind == "commit":
            self.database.refuse("database or disk is full")
        raise OSError(errno.ENOSPC, "No space left on device")

    @property
    def full(self) -> bool:
        return self.moments < self.full_until

    # time

    def sleep(self, seconds: float) -> None:
        """Let time pass; timers that come due are run."""
        self.now += timedelta(seconds=seconds)
        self.monotonic += seconds
        due = [timer for timer in self._timers if timer[0] <= self.monotonic]
        self._timers = [timer for timer in self._timers if timer[0] > self.monotonic]
        for _, what in due:
            what()

    def later(self, seconds: float, what: Callable[[], None]) -> Callable[[], None]:
        """Run something after some seconds; returns what calls it off."""
        timer = (self.monotonic + seconds, what)
        self._timers.append(timer)
        return lambda: self._timers.remove(timer) if timer in self._timers else None

    def jump(self) -> None:
        """The clock is set, and not that of intervals."""
        self.jumped = True
        hours = self.rng(self.moments, "jump").choice([-50, -25, -2, -0.01, 0.5, 3, 26, 400])
        self.now += timedelta(hours=hours)

    # people

    def order(self, kind: str, **arguments: object) -> int | None:
        """Somebody gives an order through a connection of their own, as CLI, API and page do."""
        rng = self.rng(self.moments, kind)
        store = self.database.outside
        if kind == "reload":
            self.variant += 1
        elif kind == "pause":
            arguments = {"after": rng.choice(["stage", "round"]), **arguments}
        elif kind in ("rollback", "pin"):
            arguments = {"version": rng.randint(0, store.last_round()), **arguments}
            if kind == "pin":
                arguments["pinned"] = rng.random() < 0.7
        elif kind == "add_prompts":
            arguments = {"rows": [{"prompt": f"added {rng.randint(0, 3)}"}, {"prompt": f"added {self.moments}"}]}
        try:
            number = orders.submit(store, kind, arguments, "person")
        except InputError as error:
            self.tell(f"not given: {error}")
            return None
        except SelfplayError as error:  # pragma: no cover
            raise Violation(f"an order cannot be given: {error}") from error
        self.tell(f"order {number}: {kind} {arguments}")
        return number

    def start_process(self) -> None:
        """The next process of the service begins: only what is on disk is left."""
        self._timers.clear()
        self.dead, self.active = False, True


def plan_of(seed: int) -> dict[int, str]:
    """What happens in the history of a seed. An action that does not fit its moment is left out then."""
    rng = random.Random(f"plan {seed}")
    at, apart = rng.randint(1, rng.choice([40, 140])), rng.choice([4, 15, 40])
    plan = {at: ANY}
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        at += 1 + int(rng.expovariate(1 / apart))
        plan[at] = ANY
    return plan
