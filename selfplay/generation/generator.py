"""The generator: the controller's side of the vLLM engine. It keeps the engine alive and says which policy answers.

An engine that dies is started again with the policy last verified for service. The weights that were in it are swapped in
and verified again, and the call is repeated. Seeds make its answers the same; on a CPU they are the same to the bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from selfplay.config import Config
from selfplay.errors import CheckpointError, DiskError, EngineError, InputError, SwapError
from selfplay.generation.installing import EngineInfo, NotShown, WarmEngine
from selfplay.generation.swap import Canaries, SwapReport, check_fits
from selfplay.processes.child import ChildDied, ChildError
from selfplay.processes.protocol import Event
from selfplay.storage import policies
from selfplay.storage.policies import Manifest, TensorSpec
from selfplay.types import Policy

Result = TypeVar("Result")

UNSOUND = ("oom", "internal", "shape")  # errors after which the engine's state is not to be trusted
RAISED = {"input": InputError, "disk": DiskError}  # by the kind of a child's error; all others are an EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What became of one shard."""

    rows: int  # answers in its file
    tokens: int  # sampled for them
    seconds: float  # that the engine took


class Generator:
    """One vLLM engine in a child process. Not for use from several threads at a time.

    `verified` is the policy that the engine starts from after a fault; `policy` is the one whose weights answer. They
    differ only while a candidate is evaluated (`swap(..., keep_verified=True)`).
    """

    def __init__(
        self, config: Config, run_dir: Path, log: Path, *, on_event: Callable[[str, str], None] | None = None
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._tell = on_event or (lambda kind, text: None)
        self._shape: tuple[dict[str, TensorSpec], dict[str, Any]] | None = (
            None  # tensors and config.json of the run's model
        )
        self.engine = WarmEngine(config, run_dir, log)
        self.policy: Policy | None = None
        self.verified: Policy | None = None

    @property
    def info(self) -> EngineInfo | None:
        """What runs; None before the first policy was loaded."""
        return self.engine.info

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration of the same policy; an engine that it would make otherwise is ended."""
        if _made_from(config) != _made_from(self._config):
            self.stop()
        self._config = self.engine.config = config

    # its life

    def start(self) -> None:
        """Start the engine's process, whose imports take seconds, unless there is one; returns at once."""
        self.engine.start()

    def load(self, policy: Policy) -> EngineInfo:
        """Wait for the engine, load its first policy and verify it; starts the process where `start` was not called.

        Raises CheckpointError, ConfigError, InputError (a model that vLLM cannot serve), SwapError or EngineError.
        """
        if self.engine.loaded:
            self.stop()
        self.verified = self.policy = policy
        try:
            self._alive(lambda: None)
        except BaseException:
            self.verified = self.policy = None
            self.stop()
            raise
        assert self.info is not None
        return self.info

    def stop(self) -> None:
        """End the engine. The next call starts it again, with the weights that were in it."""
        self.engine.stop()

    # what it is for

    def sample(
        self,
        prompts: Path,
        start: int,
        count: int,
        seeds: Sequence[int],
        out: Path,
        *,
        candidates: int | None = None,
        max_tokens: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Sampled:
        """Have the engine answer the prompts start … start + count − 1 of a file of `Prompt` rows.

        Its answers are `Candidate` rows in the file `out`, prompt by prompt. Whoever calls makes that file durable; where this
        fails there is none. `seeds` has one for each of the prompts; candidate i uses its seed + i. `candidates` is how many
        of each, by default `generate.candidates`. `max_tokens` is the longest of them, by default `generate.max_tokens`.
        `on_progress` gets the number of prompts done. Raises InputError for a prompt that does not fit, DiskError, EngineError.
        """
        assert len(seeds) == count > 0
        settings = self._config.generate

        def work() -> Sampled:
            assert self.info is not None and self.policy is not None
            stops = settings.stop_token_ids if settings.stop_token_ids is not None else self.info.eos_ids
            found = self.engine.order(
                "generate",
                _on_done(on_progress),
                prompts=str(prompts),
                start=start,
                count=count,
                seeds=list(seeds),
                policy=self.policy.version,
                out=str(out),
                sampling={
                    "n": settings.candidates if candidates is None else candidates,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "top_k": settings.top_k,
                    "max_tokens": settings.max_tokens if max_tokens is None else max_tokens,
                    "stop_token_ids": stops,
                },
            )
            return Sampled(**found)

        try:
            return self._alive(work)
        except BaseException:
            out.unlink(missing_ok=True)
            raise

    def answer_logps(
        self,
        prompts: Path,
        answers: Path,
        start: int,
        count: int,
        per_prompt: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float64]:
        """Summed log-probabilities (nats, temperature 1) of the answers start … start + count − 1 of a file: (count,).

        `answers` is a file of `Candidate` rows, whose first `per_prompt` rows are answers to the first row of `prompts`, and so
        on. `on_progress` gets the number of answers done. Raises InputError where the two do not agree, EngineError.
        """
        if not count:
            return np.zeros(0)

        def work() -> NDArray[np.float64]:
            found = self.engine.order(
                "answer_logps",
                _on_done(on_progress),
                prompts=str(prompts),
                answers=str(answers),
                start=start,
                count=count,
                per_prompt=per_prompt,
            )
            return np.array(found, np.float64)

        logps = self._alive(work)
        assert logps.shape == (count,) and np.isfinite(logps).all()
        return logps

    def swap(self, policy: Policy, *, keep_verified: bool = False) -> SwapReport:
        """Put another policy's weights into the running engine and show that they answer.

        With `keep_verified` an engine that dies later still starts from the policy that was verified before; the new
        weights are then swapped in on top. Raises CheckpointError for a checkpoint that is damaged or does not fit (the
        running weights are untouched), SwapError when its weights could not be shown to be in, even in a new engine; the
        next call then starts one with the policy that was verified before.
        """
        assert self.verified is not None, "load a policy before swapping"
        began = time.monotonic()
        manifest = self._checked(policy)  # before anything is touched
        try:
            if not self.engine.loaded:  # where it sleeps, the old weights need not come back
                self._bring_up()
            report = self._install(policy, manifest, self.engine.canaries, began)
        except (ChildDied, ChildError, NotShown) as error:
            report = self._restart_with(policy, manifest, began, str(error))
        self.policy = policy
        if not keep_verified:
            self.verified = policy
        return report

    def promote(self) -> None:
        """From now on a new engine starts from the policy that answers, after a `swap(…, keep_verified=True)`."""
        self.verified = self.policy

    def sleep(self, level: int = 2) -> bool:
        """Give the accelerator's memory back until the next call; False where the platform has no such thing.

        Level 1 keeps the weights in main memory, level 2 drops them: the next call reads them from disk.
        """
        if self.engine.asleep is None:
            return self._alive(lambda: self.engine.sleep(level))
        return True

    def wake(self) -> None:
        """Take the memory back and have the policy answer again. Every call that needs it does this by itself."""
        self._alive(lambda: None)

    # supervision

    def _alive(self, work: Callable[[], Result]) -> Result:
        """Do `work` with an engine that runs `self.policy`; where the engine dies, start another and do it again."""
        restarts = self._config.generate.engine.restarts
        for attempt in range(restarts + 1):
            try:
                self._bring_up()
                return work()
            except ChildDied as died:
                self.stop()
                if attempt == restarts:
                    raise EngineError(f"{died}, {attempt + 1} times in this call", f"see {died.log}") from died
                pause = min(0.5 * 2**attempt, 30.0)
                self._tell("engine_restart", f"{died}; starting it again in {pause:.1f} s")
                time.sleep(pause)
            except ChildError as error:
                self._fail(error)
            except NotShown as error:
                raise SwapError(str(error), f"see {self.engine.log}") from error
        raise AssertionError("unreachable")

    def _fail(self, error: ChildError) -> NoReturn:
        if error.kind in UNSOUND:
            self.stop()
        raise RAISED.get(error.kind, EngineError)(str(error), error.hint or f"see {error.log}") from error

    def _bring_up(self) -> None:
        """Have a running, awake engine with the weights of `self.policy`."""
        assert self.policy is not None and self.verified is not None, "load a policy first"
        if not self.engine.loaded:
            self._load(self.verified, self._manifest(self.verified))
            if self.policy != self.verified:
                self._install(self.policy, self._checked(self.policy), self.engine.canaries, time.monotonic())
        elif self.engine.asleep is not None:
            self._install(self.policy, self._manifest(self.policy), None, time.monotonic())

    def _load(self, policy: Policy, manifest: Manifest) -> None:
        """Load a policy into a fresh engine; its tensors and settings are those of the run's model from then on."""
        shape = policies.tensors(Path(policy.path)), _model_config(policy)
        self.engine.load(policy, Canaries.of(manifest.canaries), shape[1])
        self._shape = shape

    def _install(self, policy: Policy, manifest: Manifest, parent: Canaries | None, began: float) -> SwapReport:
        return self.engine.install(policy, Canaries.of(manifest.canaries), parent, began)

    def _restart_with(self, policy: Policy, manifest: Manifest, began: float, why: str) -> SwapReport:
        """Start a fresh engine with the new weights, once; a failure leaves none running."""
        self.stop()
        self._tell(
            "swap_restart", f"policy {policy.version} could not be swapped in ({why}); starting a new engine with it"
        )
        try:
            self._load(policy, manifest)
        except (ChildDied, ChildError, NotShown) as failure:
            self.policy = self.verified
            raise SwapError(
                f"policy {policy.version} could not be shown to be in the engine: {why}; then in a new engine: {failure}",
                f"see {self.engine.log}",
            ) from failure
        return self.engine.restarted(policy, began)

    def _checked(self, policy: Policy) -> Manifest:
        """The manifest of a policy whose files are whole and fit the running model; raises CheckpointError."""
        manifest = self._manifest(policy)
        assert self._shape is not None
        tensors, config = self._shape
        check_fits(tensors, policies.tensors(Path(policy.path)), config, _model_config(policy))
        return manifest

    def _manifest(self, policy: Policy) -> Manifest:
        """The run's manifest of the policy, every file of it checked.

        The manifest that a source folder has of its own, as a policy of another run, has no say.
        """
        folder = policies.Policies(self._run_dir).folder(policy.version)
        manifest = policies.verify(folder)
        assert Path(manifest.source or folder).resolve() == Path(policy.path).resolve(), "policies come from the run"
        Canaries.of(manifest.canaries)
        return manifest


def _made_from(config: Config) -> tuple[object, ...]:
    """What an engine is started with: it cannot change under one that runs."""
    place, generate = config.placement, config.generate
    lengths = (config.prompts.max_tokens, generate.max_tokens)  # they decide on its context
    return config.policy, config.run.seed, lengths, generate.engine, place.generator, place.colocated


def _on_done(on_progress: Callable[[int], None] | None) -> Callable[[Event], None] | None:
    return None if on_progress is None else lambda event: on_progress(event["done"])


def _model_config(policy: Policy) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((Path(policy.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{policy.path}/config.json cannot be read: {error}") from None
    return config
