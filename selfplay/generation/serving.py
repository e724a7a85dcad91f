"""Which policy the engine of a run serves, and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable

from selfplay.generation.generator import Generator
from selfplay.generation.swap import SwapReport
from selfplay.progress import Display
from selfplay.types import Policy


class Serving:
    """The engine of a run, which gets the current policy at its first use.

    current: the policy that serves between rounds. warm_up: starts the processes of the run, so that they import while the
    engine loads. turn: waits for the turn of a role on the GPUs, where roles share them.
    """

    def __init__(
        self,
        generator: Generator,
        current: Callable[[], Policy],
        warm_up: Callable[[], None],
        display: Display,
        turn: Callable[[str], None] = lambda role: None,
    ) -> None:
        self.generator = generator
        self._current, self._warm_up, self._display, self._turn = current, warm_up, display, turn

    @property
    def loaded(self) -> bool:
        """Whether the engine has a policy; without one it holds no memory of an accelerator."""
        return self.generator.policy is not None

    def sleep(self) -> bool:
        """Give the accelerator's memory back until the next call: it is the trainer's turn."""
        self._turn("trainer")
        return self.generator.sleep()

    def wake(self) -> None:
        """Take the memory back."""
        self._turn("engine")
        self.generator.wake()

    def engine(self) -> Generator:
        """The engine, with the current policy in it if it has none yet."""
        if not self.loaded:
            self._warm_up()
        self._turn("engine")
        if not self.loaded:
            policy = self._current()
            with self._display.stage(None, "engine") as line:
                line.update(text=f"loading policy {policy.version}")
                self.generator.load(policy)
        return self.generator

    def serve(self, policy: Policy, trial: bool = True) -> SwapReport | None:
        """Have the engine serve `policy`: a verified swap unless it is in already, when there is no report.

        In a trial the engine, should it die, starts from the policy that was verified before, and swaps this one in again.
        """
        engine = self.engine()
        if engine.policy == policy:
            if not trial:
                engine.promote()
            return None
        return engine.swap(policy, keep_verified=trial)
