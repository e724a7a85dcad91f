"""One engine of the pool, kept alive: it is started again when it dies, and gets the weights that it is to serve.

What takes long runs on a thread of its own (`begin`), so that the other engines go on meanwhile. That thread is the only one
that speaks to the engine as long as it runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

from selfplay.config import Config
from selfplay.errors import DiskError, EngineError, InputError, Interrupted, SwapError
from selfplay.generation.checkpoints import Checkpoints
from selfplay.generation.installing import NotShown, WarmEngine
from selfplay.generation.swap import Canaries, SwapReport
from selfplay.processes.child import ChildDied, ChildError
from selfplay.storage.policies import Manifest
from selfplay.types import Policy

UNSOUND = ("oom", "internal", "shape")  # errors after which the engine's state is not to be trusted
RAISED = {"input": InputError, "disk": DiskError}  # by the kind of a child's error; all others are an EngineError
LONGEST_PAUSE = 30.0  # seconds before a dead engine is started again


class SupervisedEngine:
    """An engine, the policy that it is to serve (`wanted`), and the one that it starts from after a fault (`verified`)."""

    def __init__(self, warm: WarmEngine, checkpoints: Checkpoints, tell: Callable[[str, str], None]) -> None:
        self.warm = warm
        self.wanted: Policy | None = None
        self.verified: Policy | None = None
        self.failed: Exception | None = None
        """Why it was set aside: none of its restarts helped. It is tried again at the next call."""
        self.troubled = False
        """Whether it failed since it served last. Nobody waits for it then, as long as enough others serve."""
        self.job: Future[SwapReport | None] | None = None
        """What runs on its thread."""
        self._checkpoints, self._tell = checkpoints, tell
        self._ending = threading.Event()
        self._deaths, self._pause = 0, 0.0

    @property
    def ready(self) -> bool:
        """Whether it answers with the weights of the policy that it is to serve."""
        warm = self.warm
        return self.job is None and warm.loaded and warm.asleep is None and warm.policy == self.wanted

    # its thread

    def begin(self, work: Callable[[], SwapReport | None]) -> Future[SwapReport | None]:
        """Do `work` on a thread of its own; `job` tells when it is done, and so does what this returns."""
        assert self.job is None, "one thing at a time"
        job: Future[SwapReport | None] = Future()
        self.job = job

        def run() -> None:
            try:
                job.set_result(work())
            except BaseException as error:
                job.set_exception(error)

        threading.Thread(target=run, name=self.warm.name, daemon=True).start()
        return job

    def call(self, **more: int) -> None:
        """A new call begins: its deaths are counted anew. One that was set aside has a single try."""
        if self.job is None:
            self._deaths = self._restarts if self.failed is not None else 0
            self._pause = 0.0

    def stop(self) -> None:
        """End the process, whatever its thread does."""
        if self.job is not None:
            self._ending.set()
            while not self.job.done():
                if (child := self.warm.child) is not None:
                    child.cut()
                with contextlib.suppress(BaseException):
                    self.job.exception(timeout=0.05)
            self.job = None
            self._ending.clear()
        self.warm.stop()

    # what runs on it

    def serve(self) -> None:
        """Have it run, awake, with the weights of `wanted`, and start it again where it dies.

        Raises EngineError where it dies too often, SwapError, CheckpointError, ConfigError, InputError or DiskError.
        """
        while True:
            if self._ending.wait(self._pause):
                raise Interrupted("the engine is to end")
            self._pause = 0.0
            try:
                self._bring_up()
                return
            except ChildDied as died:
                self.lost(died)
            except ChildError as error:
                self.refuse(error)
            except NotShown as error:
                raise SwapError(str(error), f"see {self.warm.log}") from error

    def lost(self, died: ChildDied) -> None:
        """Count a death; `serve` then starts it again, after a pause. Raises EngineError where there were too many in this call."""
        self.warm.stop()
        self.troubled = True
        self._deaths += 1
        if self._deaths > self._restarts:
            raise EngineError(f"{died}, {self._deaths} times in this call", f"see {died.log}") from died
        if self._ending.is_set():
            raise Interrupted("the engine is to end")
        self._pause = min(0.5 * 2 ** (self._deaths - 1), LONGEST_PAUSE)
        self._tell("engine_restart", f"{died}; starting it again in {self._pause:.1f} s")

    def refuse(self, error: ChildError) -> NoReturn:
        """Raise what a failed order means, and end an engine whose state is not to be trusted after it."""
        if error.kind in UNSOUND:
            self.warm.stop()
        raise RAISED.get(error.kind, EngineError)(str(error), error.hint or f"see {error.log}") from error

    def swap(self, policy: Policy, manifest: Manifest) -> SwapReport:
        """Put another policy's weights into it and show that they answer; where that fails, start a fresh engine with them.

        Raises SwapError where they could not be shown to be in either.
        """
        began = time.monotonic()
        try:
            if not self.warm.loaded:  # where it sleeps, the old weights need not come back
                assert self.verified is not None
                self._load(self.verified, self._checkpoints.manifest(self.verified))
            return self._install(policy, manifest, self.warm.canaries, began)
        except (ChildDied, ChildError, NotShown) as error:
            return self._restart_with(policy, manifest, began, str(error))

    def _bring_up(self) -> None:
        wanted, verified, warm = self.wanted, self.verified, self.warm
        assert wanted is not None and verified is not None, "load a policy first"
        if not warm.loaded:
            self._load(verified, self._checkpoints.manifest(verified))
        if warm.policy != wanted:
            self._install(wanted, self._checkpoints.fitting(wanted), warm.canaries, time.monotonic())
        elif warm.asleep is not None:  # no other weights can be in it
            self._install(wanted, self._checkpoints.manifest(wanted), None, time.monotonic())

    def _restart_with(self, policy: Policy, manifest: Manifest, began: float, why: str) -> SwapReport:
        """Start a fresh engine with the new weights, once; a failure leaves none running."""
        self.warm.stop()
        self.troubled = True
        if self._ending.is_set():
            raise Interrupted("the engine is to end")
        self._tell(
            "swap_restart", f"policy {policy.version} could not be swapped in ({why}); starting a new engine with it"
        )
        try:
            self._load(policy, manifest)
        except (ChildDied, ChildError, NotShown) as failure:
            raise SwapError(
                f"policy {policy.version} could not be shown to be in the engine: {why}; then in a new engine: {failure}",
                f"see {self.warm.log}",
            ) from failure
        return self.warm.restarted(policy, began)

    def _load(self, policy: Policy, manifest: Manifest) -> None:
        self.warm.load(policy, Canaries.of(manifest.canaries), self._checkpoints.config(policy))
        self._checkpoints.loaded(policy)

    def _install(self, policy: Policy, manifest: Manifest, parent: Canaries | None, began: float) -> SwapReport:
        return self.warm.install(policy, Canaries.of(manifest.canaries), parent, began)

    @property
    def _restarts(self) -> int:
        return self.config.generate.engine.restarts

    @property
    def config(self) -> Config:
        return self.warm.config

    # orders in flight

    def send(self, order: str, **fields: Any) -> int:
        """Send an order without waiting for its answer; returns its number. Raises ChildDied."""
        assert self.ready and self.warm.child is not None
        read = [Path(fields[name]) for name in ("prompts", "answers") if name in fields]
        return self.warm.child.send(order, **fields, **self.warm.files(read))
