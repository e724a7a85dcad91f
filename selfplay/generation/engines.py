"""The engines of a run: which policy they serve, and what happens to one that fails.

Each engine is a process of its own (`supervised.py`). All of them are shown to serve a policy before any answers. An engine
that fails is set aside and started again while the others go on with its work, as long as `generate.min_engines` are left.
"""

from __future__ import annotations

import contextlib
import functools
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path

from selfplay.config import Config
from selfplay.errors import SelfplayError
from selfplay.generation.checkpoints import Checkpoints
from selfplay.generation.dealing import LOOK
from selfplay.generation.groups import groups
from selfplay.generation.installing import EngineInfo, WarmEngine
from selfplay.generation.supervised import SupervisedEngine
from selfplay.generation.swap import SwapReport
from selfplay.processes.child import ChildDied, ChildError
from selfplay.processes.places import HERE, Places
from selfplay.types import Policy


class Engines:
    """All engines of a run. Not for use from several threads at a time.

    `verified` is the policy that an engine starts from after a fault; `policy` is the one whose weights answer. They differ only
    while a candidate is evaluated (`swap(..., keep_verified=True)`).
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        log: Path,
        *,
        on_event: Callable[[str, str], None] | None = None,
        places: Places = HERE,
    ) -> None:
        """`log` is the log of the first engine; that of engine 2 lies beside it, as generator-2.log. `places`: where they run."""
        self._config, self._run_dir, self._log, self._places = config, run_dir, log, places
        self._on_event = on_event or (lambda kind, text: None)
        self._said: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()  # events of the engines' threads
        self._checkpoints = Checkpoints(run_dir)
        self.engines = self._make()
        self.policy: Policy | None = None
        self.verified: Policy | None = None
        self.divided = False
        """Whether some of the engines serve another policy than `policy`."""

    def _make(self) -> list[SupervisedEngine]:
        found = []
        for number, gpus in enumerate(groups(self._config), 1):
            several = self._config.generate.engine_count > 1
            log = self._log if number == 1 else self._log.with_stem(f"{self._log.stem}-{number}")
            name = f"generator {number}" if several else "generator"
            place = self._places.of("engine", number - 1)
            warm = WarmEngine(self._config, self._run_dir, log, name, gpus, place)
            found.append(SupervisedEngine(warm, self._checkpoints, lambda kind, text: self._said.put((kind, text))))
        return found

    @property
    def info(self) -> EngineInfo | None:
        """What runs; None before the first policy was loaded."""
        return next((engine.warm.info for engine in self.engines if engine.warm.info is not None), None)

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration of the same policy; engines that it would make otherwise are ended."""
        changed = _made_from(config) != _made_from(self._config)
        if changed:
            self.stop()
        self._config = config
        if changed:
            self.engines = self._make()
        for engine in self.engines:
            engine.warm.config = config
            engine.wanted, engine.verified = self.policy, self.verified

    # its life

    def start(self) -> None:
        """Start the engines' processes, whose imports take seconds, unless they are there; returns at once."""
        for engine in self.engines:
            if engine.job is None:
                engine.warm.start()

    def load(self, policy: Policy) -> EngineInfo:
        """Wait for the engines, load their first policy and verify it; starts the processes where `start` was not called.

        Raises CheckpointError, ConfigError, InputError (a model that vLLM cannot serve), SwapError or EngineError.
        """
        if any(engine.warm.loaded or engine.job is not None for engine in self.engines):
            self.stop()
        self._aim(policy, policy)
        try:
            self.serve()
        except BaseException:
            self.policy = self.verified = None
            self.stop()
            raise
        assert self.info is not None
        return self.info

    def stop(self) -> None:
        """End the engines. The next call starts them again, with the weights that were in them."""
        for engine in self.engines:
            engine.stop()
        self.tell()

    def swap(self, policy: Policy, *, keep_verified: bool = False) -> SwapReport:
        """Put another policy's weights into the running engines and show that they answer; the report of the slowest.

        With `keep_verified` an engine that dies later still starts from the policy that was verified before; the new
        weights are then swapped in on top. Raises CheckpointError for a checkpoint that is damaged or does not fit (the
        running weights are untouched), SwapError when its weights could not be shown to be in enough engines, even in new ones;
        the next call then goes back to the policy that was verified before.
        """
        assert self.verified is not None, "load a policy before swapping"
        manifest = self._checkpoints.fitting(policy)  # before anything is touched
        jobs: list[Future[SwapReport | None]] = []
        self._aim(policy, self.verified)
        # Those that serve it already show it once more where no other one can.
        again = all(engine.ready or engine.troubled for engine in self.engines)
        for engine in self.engines:
            engine.call()
            if engine.job is None and (again or not engine.ready):
                jobs.append(engine.begin(functools.partial(engine.swap, policy, manifest)))
        try:
            self._settle()
        except SelfplayError:
            self._aim(self.verified, self.verified)
            raise
        reports = [job.result() for job in jobs if job.done() and job.exception() is None]
        if not keep_verified:
            self._aim(policy, policy)
        found = [report for report in reports if report is not None]
        assert found, "an engine was swapped"
        return max(found, key=lambda report: report.seconds)

    def divide(self, policies: Sequence[Policy]) -> None:
        """Have the engines serve several policies side by side, each shown to be in; as many of the first ones as there are engines.

        An engine goes on with what it serves where that is one of them. One that dies still starts from the policy that was verified
        before. Raises as `swap` does.
        """
        assert self.verified is not None, "load a policy first"
        able = [engine for engine in self.engines if engine.failed is None] or self.engines
        chosen = list(policies[: len(able)])
        manifests = {policy: self._checkpoints.fitting(policy) for policy in chosen}  # before anything is touched
        self.policy, self.divided = chosen[0], len(chosen) > 1
        for engine, policy in _assigned(self.engines, able, chosen):
            engine.wanted, engine.verified = policy, self.verified
            engine.call()
            if engine.job is None and not engine.ready:
                swap = engine.warm.loaded and engine.warm.policy != policy
                engine.begin(functools.partial(engine.swap, policy, manifests[policy]) if swap else engine.serve)
        try:
            self._settle()
        except SelfplayError:
            self._aim(self.verified, self.verified)
            raise

    def promote(self) -> None:
        """From now on a new engine starts from the policy that answers, after a `swap(…, keep_verified=True)`."""
        assert self.policy is not None
        self._aim(self.policy, self.policy)

    def sleep(self, level: int = 2) -> bool:
        """Give the accelerator's memory back until the next call; False where the platform has no such thing.

        Level 1 keeps the weights in main memory, level 2 drops them: the next call reads them from disk.
        """
        slept = []
        for engine in self.engines:
            if engine.ready:
                try:
                    slept.append(engine.warm.sleep(level))
                except (ChildDied, ChildError):
                    engine.stop()
            elif engine.warm.asleep is None:  # it must not take memory while others count on it
                engine.stop()
        return any(slept) or any(engine.warm.asleep is not None for engine in self.engines)

    def wake(self) -> None:
        """Take the memory back and have the policy answer again. Every call that needs it does this by itself."""
        self.serve()

    # supervision

    def look_after(self) -> None:
        """Take in what the engines' threads have done. Raises what an engine failed with where too few are left."""
        self.tell()
        for engine in self.engines:
            job = engine.job
            if job is None or not job.done():
                continue
            engine.job = None
            error = job.exception()
            if isinstance(error, SelfplayError):
                self.set_aside(engine, error)
            elif error is not None:
                raise error
            elif engine.ready:
                if engine.failed is not None:
                    self._on_event("engine", f"the {engine.warm.name} process serves again")
                engine.failed, engine.troubled = None, False
            else:  # another policy was asked for meanwhile
                engine.begin(engine.serve)

    def set_aside(self, engine: SupervisedEngine, error: Exception) -> None:
        """Go on without an engine; raises `error` where fewer than `generate.min_engines` would be left."""
        engine.troubled = True
        left = sum(other.failed is None for other in self.engines if other is not engine)
        if left < self._config.generate.min_engines:
            raise error
        if engine.failed is None:
            self._on_event("warning", f"the {engine.warm.name} process is set aside, the others go on: {error}")
        engine.failed = error

    def _aim(self, policy: Policy, verified: Policy) -> None:
        self.policy, self.verified, self.divided = policy, verified, False
        for engine in self.engines:
            engine.wanted, engine.verified = policy, verified

    def serve(self) -> None:
        """A call begins: have the engines serve `policy`, and start those again that do not."""
        assert self.policy is not None and self.verified is not None, "load a policy first"
        self._aim(self.policy, self.verified)
        for engine in self.engines:
            engine.call()
            if engine.job is None and not engine.ready:
                engine.begin(engine.serve)
        self._settle()

    def _settle(self) -> None:
        """Wait for the engines; not for one that is in trouble, as long as enough others serve."""
        with self.ended_by_hand():
            while True:
                self.look_after()
                pending = [engine for engine in self.engines if engine.job is not None]
                serving = sum(engine.ready for engine in self.engines)
                enough = serving >= self._config.generate.min_engines
                if not pending or (enough and all(engine.troubled for engine in pending)):
                    return
                jobs = [engine.job for engine in pending if engine.job is not None]
                futures.wait(jobs, LOOK, futures.FIRST_COMPLETED)

    @contextlib.contextmanager
    def ended_by_hand(self) -> Iterator[None]:
        """End the engines where somebody ends the program in mid-work: nobody will ask for what they do."""
        try:
            yield
        except Exception:
            raise
        except BaseException:
            self.stop()
            raise

    def tell(self) -> None:
        """Pass on what the engines' threads have to say, in the caller's thread."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._on_event(*self._said.get_nowait())


def _assigned(
    engines: Sequence[SupervisedEngine], able: Sequence[SupervisedEngine], policies: Sequence[Policy]
) -> list[tuple[SupervisedEngine, Policy]]:
    """A policy for each engine: every policy has its share of those that are able, of which as few as possible change theirs."""
    room = {policy: len(able[i :: len(policies)]) for i, policy in enumerate(policies)}
    found = {}
    for keeps in (True, False):
        for engine in able:
            policy = engine.warm.policy if keeps else next((policy for policy in policies if room[policy]), None)
            if engine not in found and policy is not None and room.get(policy):
                room[policy] -= 1
                found[engine] = policy
    return [(engine, found.get(engine, policies[0])) for engine in engines]


def _made_from(config: Config) -> tuple[object, ...]:
    """What engines are started with: it cannot change under those that run."""
    place, generate = config.placement, config.generate
    lengths = (config.prompts.max_tokens, config.longest_answer)  # they decide on their context
    policy = config.policy.model_copy(update={"thinking": None})  # which is told with each order
    return policy, config.run.seed, lengths, generate.engine, generate.engines, place.generator, place.colocated
