"""The trainer of a run, seen from the controller: one child process that is given orders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from selfplay.config import Config
from selfplay.errors import InputError, TrainError
from selfplay.processes import gpus
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.logs import last_line
from selfplay.training.jobs import CLUSTERS
from selfplay.types import Message

STARTS = 2  # a trainer that dies is started once more; it resumes from its last save

Tell = Callable[[str, str], None]  # kind and text of an event


class Neighbour(Protocol):
    """An engine that may share its GPUs with the trainer."""

    @property
    def loaded(self) -> bool:
        """Whether it has a policy; without one it holds no memory."""

    def sleep(self) -> object:
        """Give the accelerator's memory back until it is asked for something."""

    def wake(self) -> object:
        """Take the memory back."""


class Trainer:
    """The trainer child. It is started early, so that its imports run beside other work, and then waits for orders.

    `config` is read at each start, so that another configuration may be set between rounds.
    """

    def __init__(self, config: Config, run_dir: Path, engine: Neighbour, on_event: Tell) -> None:
        self.config, self._run_dir, self._engine, self._on_event = config, run_dir, engine, on_event
        self._child: Child | None = None

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.alive

    def start(self) -> Child:
        """The process; started where there is none, when it begins its imports. Returns at once."""
        if self._child is not None and self._child.alive:
            return self._child
        if self._child is not None:
            self._on_event("trainer_restart", "the trainer died while it waited for an order; starting it again")
        self.stop()
        settings = self.config.train
        launcher = [sys.executable]
        if settings.accelerate is not None:
            if not settings.accelerate.is_file():
                raise InputError(f"train.accelerate: {settings.accelerate}: no such file")
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(settings.accelerate)]
        given = self.config.placement.trainer
        if settings.accelerate is None and gpus.count():
            given = (given or [0])[
                :1
            ]  # one process uses one GPU; of several that it sees it would make another kind of trainer
        env = {"OMP_NUM_THREADS": str(settings.cpu_threads), **gpus.environment(given)}
        clusters = self.config.depth.method == "gradient" or self.config.breadth.method == "clusters"
        self._child = Child(
            "trainer",
            [*launcher, "-m", "selfplay.training.trainer", *([CLUSTERS] if clusters else [])],
            run_dir=self._run_dir,
            log=self._run_dir / "logs" / "trainer.log",
            env=env,
            silence=settings.silence,
        )
        self._child.start()
        return self._child

    def stop(self) -> None:
        """End the process. The next call starts another one."""
        if self._child is not None:
            self._child.stop(grace=0)
            self._child = None

    def hear(self) -> None:
        """Take in what it has said so far. For `meanwhile`, where that takes long."""
        if self._child is not None:
            self._child.hear()

    def render(self, policy: Path, trust_remote_code: bool, conversations: Sequence[list[Message]]) -> Any:
        """Token ids of each conversation by the policy's chat template, or why it has none. Raises ChildDied."""
        assert self._child is not None, "the trainer runs"
        try:
            return self._child.order(
                "render",
                policy=str(policy),
                trust_remote_code=trust_remote_code,
                conversations=list(conversations),
            )
        except ChildError as error:
            raise InputError(str(error), error.hint) from error

    def order(
        self,
        name: str,
        job: BaseModel,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
        meanwhile: Callable[[], object] = lambda: None,
        last: bool = True,
    ) -> dict[str, Any]:
        """Give the trainer an order and wait for its result. Raises TrainError.

        `meanwhile` works with the engine while the trainer works. Where both share a GPU it comes first, the engine then
        sleeps, and the trainer ends with its order, so that none of its memory is left when the engine wakes. Not so before
        the `last` order of two that follow each other: the engine sleeps on, and the trainer waits for the next one.
        """
        colocated = self.config.placement.colocated
        for start in range(STARTS):
            try:
                if colocated:
                    meanwhile()
                    if self._engine.loaded:
                        self._engine.sleep()
                trainer = self.start()
                sent = trainer.send(name, job=job.model_dump(mode="json"))
                if not colocated:
                    meanwhile()
                result = trainer.result(sent, on_progress)
                if colocated and last:
                    self.stop()
                    if self._engine.loaded:
                        self._engine.wake()
                assert isinstance(result, dict), "an order is answered by a mapping"
                return result
            except ChildError as error:
                raise TrainError(error.kind, str(error), error.hint) from error
            except ChildDied as error:
                if start + 1 == STARTS:
                    why = f"{error}; the last it said: {last_line(error.log)}"
                    raise TrainError(
                        "died", why, "it resumes from its last save: run the same command again"
                    ) from error
                self.stop()  # otherwise it would be told once more, as one that died while it waited
                self._on_event("trainer_restart", f"{error}; starting it again, it resumes from its last save")
        raise AssertionError("every start returns or raises")
