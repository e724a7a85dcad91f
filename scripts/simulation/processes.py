"""What stands for the children of a run: the engines, the trainer, the reward and the importer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfplay import seeds
from selfplay.config import Config
from selfplay.errors import EngineError, RewardError, SelfplayError, SwapError, TrainError
from selfplay.generation.swap import SwapReport
from selfplay.processes import children
from selfplay.prompts.importer import INITIAL
from selfplay.storage import folders, policies
from selfplay.types import Policy
from simulation.threads import CLOCK
from simulation.world import Crash

Tell = Callable[[str, str], None]
WEIGHTS = "model.safetensors"
LOOK = 600.0  # virtual seconds between two looks of the watch over stalls at a child that hangs


def digest(*parts: object) -> str:
    return f"{seeds.derive(*parts):016x}"


class Process:
    """A child that works, and may be ended by any thread."""

    def __init__(self, name: str) -> None:
        children.check_may_start()
        self.name, self.gone = name, False
        children.add(self)

    def stop(self, grace: float = 5.0) -> None:
        self.gone = True
        children.discard(self)

    def cut(self) -> None:
        self.gone = True

    def work(self, what: str, seconds: float) -> bool:
        """Whether it did what it was asked; it may die of it, hang until it is ended, or be cut."""
        world = CLOCK.world
        world.sleep(seconds)
        fault = world.moment("child", f"{self.name} {what}")
        while fault == "hang" and not self.gone:
            world.sleep(LOOK)
            assert world.daemon is not None
            world.daemon._stalls.look()
        children.note_output()
        if fault == "die" or self.gone:
            self.stop()
            return False
        return True


class Generator:
    """As `generation.generator.Generator`, whose engines are one here."""

    def __init__(self, config: Config, run_dir: Path, log: Path, *, on_event: Tell, places: object) -> None:
        self._run_dir, self._tell = run_dir, on_event
        self.policy: Policy | None = None
        self.verified: Policy | None = None
        self.divided = False
        self.info: Any = None
        self.weights: str | None = None
        """Digest of what is in the engine."""
        self.shown: int | None = None
        """The policy that it was last shown to serve, where no other one was put in since."""
        self._process: Process | None = None

    def reconfigure(self, config: Config) -> None:
        pass

    def start(self) -> None:
        if self._process is None or self._process.gone:
            self._process, self.weights = Process("engine"), None

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
        self._process = self.weights = None

    def load(self, policy: Policy) -> None:
        self.stop()
        self.policy = self.verified = policy
        try:
            self._install(policy, "load")
        except BaseException:
            self.policy = self.verified = None
            self.stop()
            raise

    def swap(self, policy: Policy, *, keep_verified: bool = False) -> SwapReport:
        assert self.verified is not None, "load a policy before swapping"
        policies.verify(self._run_dir / "policies" / f"{policy.version:04d}", masters=False)
        began, self.policy = CLOCK.world.monotonic, policy
        try:
            self._install(policy, "swap")
        except SelfplayError:
            self.policy = self.verified
            raise
        if not keep_verified:
            self.verified = policy
        seconds = CLOCK.world.monotonic - began
        return SwapReport(
            policy=policy.version, method="canaries", seconds=seconds, seconds_to_first_token=seconds, to_new=0.0,
            to_parent=None, gap=None, noise=0.0, prefix_error=None, compared=None, restarted=False,
        )  # fmt: skip

    def promote(self) -> None:
        self.verified = self.policy

    def sleep(self, level: int = 2) -> bool:
        return False

    def wake(self) -> None:
        self.serve()

    def serve(self) -> None:
        """A call begins: start an engine that has ended again, with the weights that it had."""
        assert self.policy is not None, "load a policy first"
        if self._process is None or self._process.gone or self.weights is None:
            self._install(self.policy, "start")

    def answers(self, what: str) -> str:
        """A digest of what the engine answers, by the weights that are in it."""
        for _ in range(2):
            self.serve()
            assert self._process is not None
            if self._process.work(what, 20.0):
                assert self.weights is not None
                return digest("answers", self.weights, what)
            self._tell("engine_restart", "the engine ended; starting it again")
        raise EngineError("the engine ended twice")

    def _install(self, policy: Policy, what: str) -> None:
        self.shown = self.weights = None
        self.start()
        assert self._process is not None
        weights = (Path(policy.path) / WEIGHTS).read_text()
        if not self._process.work(f"{what} policy {policy.version}", 5.0):
            raise SwapError("the new weights could not be shown") if what == "swap" else EngineError("no engine")
        self.weights, self.shown = weights, policy.version
        self.info = SimpleNamespace(start_seconds=5.0, max_model_len=128)


class Service:
    """A service with one child, which is started when it is needed."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._process: Process | None = None

    def start(self) -> Process:
        if self._process is None or self._process.gone:
            self._process = Process(self.role)
        return self._process

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
        self._process = None

    def make_room(self) -> None:
        pass


class Trainer(Service):
    """As `training.service.Trainer`."""

    alive = False

    def __init__(self, config: Config, run_dir: Path, engine: object, on_event: Tell, places: object) -> None:
        super().__init__("trainer")
        self.config = config

    @contextlib.contextmanager
    def for_a_round(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def step(self, what: str) -> None:
        if not self.start().work(what, 60.0):
            raise TrainError("died", "the trainer died")


class Scorer(Service):
    """As `rewards.scorer.Scorer`."""

    def __init__(self, role: str, *args: object, **kwargs: object) -> None:
        super().__init__(role)

    def score(self, text: str) -> str:
        if not self.start().work("score", 10.0):
            raise RewardError("the reward does not answer")
        return digest("score", text)


def ask_importer(run_dir: Path, order: str, on_event: Tell, **fields: Any) -> Any:
    """As `rounds.importing.ask_importer`, of a pool of a few prompts."""
    fields["meanwhile"]()
    process = Process("importer")
    try:
        if not process.work("import", 5.0):
            raise SelfplayError("the importer ended")
        out, model = Path(fields["out"]), fields["config"]["policy"]["model"]
        canaries = {"token_ids": [[1, 2, 3]], "logps": [-1.0]}
        folders.write_json(out / "prompts.json", [f"{n + 1:016x}" for n in range(PROMPTS)])
        folders.write_json(out / INITIAL, {"source": str(Path(model).resolve()), "canaries": canaries})
    finally:
        if not CLOCK.world.dead:
            process.stop()
    return {"said": [], "set_aside": {}, "dated": False, "prompts": {"train": PROMPTS}}


PROMPTS = 7  # of the pool; a round draws three, so epochs end within rounds
__all__ = ["Crash", "Generator", "Process", "Scorer", "Trainer", "ask_importer", "digest"]
