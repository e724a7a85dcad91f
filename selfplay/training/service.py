"""The trainer of a run, seen from the controller: one child process that is given orders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from selfplay.config import Config
from selfplay.config.secrets import to_load
from selfplay.errors import InputError, TrainError
from selfplay.processes import cores, gpus
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.children import owning
from selfplay.processes.logs import last_line
from selfplay.processes.places import ADDRESS, HERE, NODE, PORT, Places
from selfplay.storage import seen
from selfplay.training.jobs import CLUSTERS, Job

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launch:
    """How the process is started. One that was started in another way is of no use."""

    argv: list[str]
    env: dict[str, str]
    silence: float


class Trainer:
    """The trainer child. It is started early, so that its imports run beside other work, and then waits for orders.

    `config` is read at each start and each order, so that another configuration may be set between rounds. A process that
    stays (`train.stay`) imports once, and keeps the models that the next round starts from.
    """

    def __init__(self, config: Config, run_dir: Path, engine: Neighbour, on_event: Tell, places: Places = HERE) -> None:
        self.config, self._run_dir, self._engine, self._on_event = config, run_dir, engine, on_event
        self._place = places.of("trainer")
        self._child: Child | None = None
        self._launched: _Launch | None = None

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.alive

    @property
    def stays(self) -> bool:
        """Whether the process lives on after a round. Processes behind a launcher end: they know each other only once."""
        return self.config.train.stay and self.config.train.accelerate is None

    @contextmanager
    def for_a_round(self) -> Iterator[None]:
        """The time in which a round may need it. After a failure it ends, since it may be at work for nobody."""
        try:
            yield
        except BaseException:
            self.stop()
            raise
        self.make_room()

    def start(self) -> Child:
        """The process, as the configuration of now wants it; started where there is none, when it begins its imports.

        Returns at once.
        """
        launch = self._launch()
        if self._child is not None and self._child.alive and self._launched == launch:
            return self._child
        if self._child is not None and not self._child.alive:
            self._on_event("trainer_restart", "the trainer died while it waited for an order; starting it again")
        self.stop()
        log = self._run_dir / "logs" / "trainer.log"
        self._child = Child(
            "trainer",
            launch.argv,
            run_dir=self._run_dir,
            log=log,
            env=launch.env,
            silence=launch.silence,
            place=self._place,
        )
        self._launched = launch
        self._child.start()
        return self._child

    def _launch(self) -> _Launch:
        settings = self.config.train
        launcher = [sys.executable]
        if settings.accelerate is not None:
            if not settings.accelerate.is_file():
                raise InputError(f"train.accelerate: {settings.accelerate}: no such file")
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(settings.accelerate)]
        cluster = self.config.cluster
        if cluster is not None and cluster.trainer.nodes > 1:  # the first node's process takes the orders
            launcher += ["--num_machines", str(cluster.trainer.nodes), "--machine_rank", NODE]
            launcher += ["--main_process_ip", ADDRESS, "--main_process_port", PORT]
        given = self.config.placement.trainer
        if settings.accelerate is None and cluster is None and gpus.count():
            given = (given or [0])[:1]  # of several GPUs that one process sees it would make another kind of trainer
        # Threads that wait for work sleep: the cores belong to whatever runs meanwhile.
        env = {
            "OMP_NUM_THREADS": str(cores.trainer_threads(self.config)),
            "OMP_WAIT_POLICY": "PASSIVE",
            **gpus.environment(given),
        }
        clusters = self.config.depth.method == "gradient" or self.config.breadth.method == "clusters"
        breadth = self.config.breadth
        if breadth.method == "clusters" and breadth.embedding != "policy":
            env |= owning(*to_load(breadth.embedding))
        argv = [*launcher, "-m", "selfplay.training.trainer", *([CLUSTERS] if clusters else [])]
        return _Launch(argv=argv, env=env, silence=settings.silence)

    @property
    def apart(self) -> bool:
        """Whether the engine must not work beside the trainer: both on one GPU, or on the same cores."""
        return self.config.placement.colocated or not (gpus.count() or cores.fit_together(self.config))

    def make_room(self) -> None:
        """Leave the GPUs to others, between orders. A process that stays has given all back but its context."""
        if not self.stays:
            self.stop()

    def stop(self) -> None:
        """End the process. The next call starts another one."""
        if self._child is not None:
            self._child.stop(grace=0)
            self._child = None

    def hear(self) -> None:
        """Take in what it has said so far. For `meanwhile`, where that takes long."""
        if self._child is not None:
            self._child.hear()

    def tokenize(self, order: str, **fields: Any) -> Any:
        """What the order «render» or «encode» gives (models/rendering.py). Raises ChildDied."""
        assert self._child is not None, "the trainer runs"
        try:
            return self._child.order(order, **fields)
        except ChildError as error:
            raise InputError(str(error), error.hint) from error

    def order(
        self,
        name: str,
        job: Job,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
        meanwhile: Callable[[], object] = lambda: None,
        last: bool = True,
    ) -> dict[str, Any]:
        """Give the trainer an order and wait for its result. Raises TrainError.

        `meanwhile` works with the engine while the trainer works. Where they would be in each other's way it comes first.
        Where they share a GPU the engine then sleeps, and wakes after the `last` order of some that follow each other: by
        then the trainer has given its memory back, or has ended where it does not stay.
        """
        colocated, apart = self.config.placement.colocated, self.apart
        for start in range(STARTS):
            try:
                if apart:
                    meanwhile()
                if colocated and self._engine.loaded:
                    self._engine.sleep()
                trainer = self.start()
                sent = trainer.send(name, job=job.model_dump(mode="json"), **self._files(job))
                if not apart:
                    meanwhile()
                result = trainer.result(sent, on_progress)
                if colocated and last:
                    self.make_room()
                    if self._engine.loaded:
                        self._engine.wake()
                assert isinstance(result, dict), "an order is answered by a mapping"
                for text in result.pop("repairs", ()):
                    self._on_event("repaired", text)
                return result
            except (ChildError, ChildDied) as error:
                if start + 1 == STARTS or not self._lost_a_process(error):
                    raise _failure(error) from error
                self.stop()  # otherwise it would be told once more, as one that died while it waited
                self._on_event("trainer_restart", f"{error}; starting it again, it resumes from its last save")
        raise AssertionError("every start returns or raises")

    def _lost_a_process(self, error: ChildError | ChildDied) -> bool:
        """Whether an order failed because a process ended. Of several, those that are left say so in words of their own.

        What fails on a node may also be another on the next try, as where its storage shows a file too late.
        """
        distributed = self.config.train.accelerate is not None or self._place is not HERE
        return isinstance(error, ChildDied) or (distributed and error.kind == "internal")

    def _files(self, job: Job) -> dict[str, Any]:
        """A field of an order: the files of a job, for a trainer elsewhere, which may see others than this process has checked."""
        return {} if self._place is HERE else {seen.FILES: seen.told(job.reads())}


def _failure(error: ChildError | ChildDied) -> TrainError:
    if isinstance(error, ChildError):
        return TrainError(error.kind, str(error), error.hint)
    why = f"{error}; the last it said: {last_line(error.log)}"
    return TrainError("died", why, "it resumes from its last save: run the same command again")
