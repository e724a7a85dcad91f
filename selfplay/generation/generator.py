"""The generator: the controller's side of the vLLM engine. Keeps it alive, swaps weights in and shows that they are there.

An engine that dies is started again with the policy last verified for service, the weights that were in it are swapped in
and verified again, and the call is repeated; seeds make its answers the same. On a CPU they are the same to the bit.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from selfplay.config import Config
from selfplay.errors import CheckpointError, ConfigError, EngineError, InputError, SwapError
from selfplay.generation.swap import (
    CANARY_BLOCKS,
    CANARY_TOKENS,
    Canaries,
    SwapReport,
    check_fits,
    default_tolerance,
    distance,
    judge,
    prefix_error,
    prefix_prompt,
)
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.protocol import Event
from selfplay.storage import policies
from selfplay.storage.policies import Manifest, TensorSpec
from selfplay.types import Candidate, Policy

Result = TypeVar("Result")

USUAL_BLOCK = 32  # tokens in a block of the KV cache, where the engine does not run yet
UNSOUND = ("oom", "internal", "shape")  # errors after which the engine's state is not to be trusted


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    vllm: str
    dtype: str
    device: str
    block_size: int  # tokens
    max_model_len: int  # tokens
    eos_ids: list[int]
    supports_sleep: bool
    start_seconds: float  # from the start of the process to a loaded model


class _NotShown(Exception):
    """The weights in the engine could not be shown to be the wanted ones."""


class Generator:
    """One vLLM engine in a child process. Not for use from several threads at a time.

    `verified` is the policy that the engine starts from after a fault; `policy` is the one whose weights answer. They
    differ only while a candidate is evaluated (`swap(..., keep_verified=True)`).
    """

    def __init__(
        self, config: Config, run_dir: Path, log: Path, *, on_event: Callable[[str, str], None] | None = None
    ) -> None:
        self._config, self._run_dir, self._log = config, run_dir, log
        self._tell = on_event or (lambda kind, text: None)
        self._child: Child | None = None
        self._started = 0.0
        self._loaded = False  # verified weights of `policy` are in the engine (asleep or not)
        self._asleep: int | None = None  # level
        self._noise = 0.0  # nats a token
        self._canaries: Canaries | None = None  # of the policy in the engine
        self._shape: tuple[dict[str, TensorSpec], dict[str, Any]] | None = (
            None  # tensors and config.json of the run's model
        )
        self.info: EngineInfo | None = None
        self.policy: Policy | None = None
        self.verified: Policy | None = None
        self.tolerance = config.swap.tolerance or default_tolerance(config.policy.dtype)

    def reconfigure(self, config: Config) -> None:
        """Go on under another configuration of the same policy; an engine that it would make otherwise is ended."""
        if _made_from(config) != _made_from(self._config):
            self.stop()
        self._config = config
        self.tolerance = config.swap.tolerance or default_tolerance(config.policy.dtype)

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's process, whose imports take seconds, unless there is one; returns at once."""
        if self._child is not None:
            return
        engine = self._config.generate.engine
        environment = {}
        if self._config.placement.generator is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self._config.placement.generator))
        argv = [sys.executable, "-m", "selfplay.generation.engine"]
        argv += ["--cpu-threads", str(engine.cpu_threads), "--cpu-kv-cache-gib", str(engine.cpu_kv_cache_gib)]
        self._child = Child(
            "generator", argv, run_dir=self._run_dir, log=self._log, env=environment, silence=engine.silence
        )
        self._started, self._loaded, self._asleep = time.monotonic(), False, None
        self._child.start()

    def load(self, policy: Policy) -> EngineInfo:
        """Wait for the engine, load its first policy and verify it; starts the process where `start` was not called.

        Raises CheckpointError, ConfigError, InputError (a model that vLLM cannot serve), SwapError or EngineError.
        """
        if self._loaded:
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
        if self._child is not None:
            self._child.stop()
        self._child, self._loaded, self._asleep = None, False, None

    # --- what it is for ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[tuple[str, list[int], int]],
        *,
        candidates: int | None = None,
        max_tokens: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Candidate]:
        """Candidates of all prompts (prompt_id, prompt_ids, seed), prompt by prompt, in order.

        `candidates`: how many of each, by default `generate.candidates`; candidate i uses seed + i. `max_tokens`: the
        longest of them, by default `generate.max_tokens`. `on_progress` gets the number of prompts done. Raises InputError
        for a prompt that does not fit, EngineError.
        """
        if not prompts:
            return []
        settings = self._config.generate
        requests = [{"prompt_ids": ids, "seed": seed} for _, ids, seed in prompts]

        def sample() -> list[list[dict[str, Any]]]:
            assert self.info is not None
            stops = settings.stop_token_ids if settings.stop_token_ids is not None else self.info.eos_ids
            sampling = {
                "n": settings.candidates if candidates is None else candidates,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
                "max_tokens": settings.max_tokens if max_tokens is None else max_tokens,
                "stop_token_ids": stops,
            }
            found: list[list[dict[str, Any]]] = self._order(
                "generate", _on_done(on_progress), requests=requests, sampling=sampling
            )
            return found

        answers = self._alive(sample)
        assert self.policy is not None
        version = self.policy.version
        return [
            Candidate(
                prompt_id=prompt_id,
                index=index,
                text=answer["text"],
                token_ids=answer["token_ids"],
                logp=answer["logp"],
                n_tokens=len(answer["token_ids"]),
                finish_reason=answer["finish_reason"],
                policy=version,
            )
            for (prompt_id, _, _), of_prompt in zip(prompts, answers, strict=True)
            for index, answer in enumerate(of_prompt)
        ]

    def logps(
        self, sequences: Sequence[tuple[list[int], int]], on_progress: Callable[[int], None] | None = None
    ) -> list[float]:
        """Summed log-probabilities (nats, temperature 1) of the tokens start … T−1 of each (token_ids, start); start ≥ 1."""
        return self._alive(lambda: self._logps(sequences, on_progress)) if sequences else []

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
            if not self._loaded:  # where it sleeps, the old weights need not come back
                self._bring_up()
            report = self._install(policy, manifest, self._canaries, began)
        except (ChildDied, ChildError, _NotShown) as error:
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
        if self._asleep is None:
            supported = self._alive(lambda: self._order("sleep", level=level))["supported"]
            self._asleep = level if supported else None
        return self._asleep is not None

    def wake(self) -> None:
        """Take the memory back and have the policy answer again. Every call that needs it does this by itself."""
        self._alive(lambda: None)

    # --- supervision -------------------------------------------------------------------------------------------------

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
            except _NotShown as error:
                raise SwapError(str(error), f"see {self._log}") from error
        raise AssertionError("unreachable")

    def _fail(self, error: ChildError) -> NoReturn:
        if error.kind in UNSOUND:
            self.stop()
        hint = error.hint or f"see {error.log}"
        raise (InputError if error.kind == "input" else EngineError)(str(error), hint) from error

    def _bring_up(self) -> None:
        """Have a running, awake engine with the weights of `self.policy`."""
        assert self.policy is not None and self.verified is not None, "load a policy first"
        if not self._loaded:
            self._load(self.verified, self._manifest(self.verified))
            if self.policy != self.verified:
                self._install(self.policy, self._checked(self.policy), self._canaries, time.monotonic())
        elif self._asleep is not None:
            self._install(self.policy, self._manifest(self.policy), None, time.monotonic())

    def _load(self, policy: Policy, manifest: Manifest) -> None:
        """Load `policy` into a fresh engine and measure the engine's noise against its canaries."""
        config, canaries = self._config, Canaries.of(manifest.canaries)
        engine, shape = config.generate.engine, (policies.tensors(Path(policy.path)), _model_config(policy))
        context = self._context(shape[1], canaries)
        if self._child is None:
            self.start()
        assert self._child is not None
        try:
            self._child.wait_for("ready")
            found = self._order(
                "load",
                model=policy.path,
                dtype=config.policy.dtype,
                seed=config.run.seed % 2**31,
                max_model_len=context,
                max_num_seqs=engine.max_num_seqs,
                gpu_memory_utilization=engine.gpu_memory_utilization,
                tensor_parallel=engine.tensor_parallel,
                trust_remote_code=config.policy.trust_remote_code,
                sleep_mode=config.placement.colocated,
            )
            seconds = time.monotonic() - self._started
            names = ("vllm", "dtype", "device", "block_size", "max_model_len", "eos_ids", "supports_sleep")
            self.info = EngineInfo(**{name: found[name] for name in names}, start_seconds=seconds)
            self._noise = distance(self._score(canaries), canaries.logps, canaries.token_ids)
            error = self._prefix_error(canaries)
            if not max(self._noise, error) <= self.tolerance:
                raise _NotShown(
                    f"a fresh engine is {self._noise:.2g} nats a token from the canaries of policy {policy.version}, and "
                    f"{error:.2g} from itself with and without its prefix cache; swap.tolerance is {self.tolerance:.2g}"
                )
        except BaseException:
            self.stop()
            raise
        self._loaded, self._canaries, self._shape = True, canaries, shape

    def _context(self, model: dict[str, Any], canaries: Canaries) -> int:
        """Context of the engine (tokens): room for prompts, responses, one scored token more, and the canaries."""
        config = self._config
        needed = config.prompts.max_tokens + config.generate.max_tokens
        room = 1 + max(len(ids) for ids in canaries.token_ids)
        limit = model.get("max_position_embeddings")
        context = config.generate.engine.max_model_len
        if context is None:
            context = max(needed + 1, (CANARY_BLOCKS + 1) * USUAL_BLOCK + CANARY_TOKENS, room)
            context = min(context, limit) if isinstance(limit, int) else context
        if context < max(needed + 1, room):
            raise ConfigError(
                f"the engine's context is {context} tokens; prompts.max_tokens + generate.max_tokens + 1 take {needed + 1}, the "
                f"canaries {room}",
                f"the model's own limit is {limit}: lower the first two, or raise generate.engine.max_model_len",
            )
        return context

    # --- the swap ----------------------------------------------------------------------------------------------------

    def _checked(self, policy: Policy) -> Manifest:
        """The manifest of a policy whose files are whole and fit the running model; raises CheckpointError."""
        manifest = self._manifest(policy)
        assert self._shape is not None
        tensors, config = self._shape
        check_fits(tensors, policies.tensors(Path(policy.path)), config, _model_config(policy))
        return manifest

    def _install(self, policy: Policy, manifest: Manifest, parent: Canaries | None, began: float) -> SwapReport:
        """Reload in place and verify. Raises _NotShown, ChildError or ChildDied, and leaves no engine then.

        `parent`: canaries of the policy that was in the engine, None where no other weights can be in it.
        """
        new = Canaries.of(manifest.canaries)
        self._loaded = False
        try:
            if self._asleep is not None:
                self._order("wake", tags=["weights"])
            else:  # what a stale prefix cache would answer with
                self._order("canary_generate", **self._prefix_canary(new))
            self._order("reload", path=policy.path)
            if self._asleep is not None:
                self._order("wake", tags=["kv_cache"])
            self._order("reset")
            self._asleep = None
            error = self._prefix_error(new)
            first = time.monotonic() - began
            evidence, to_new, to_parent, gap = judge(self._score(new), new, parent, self._noise, self.tolerance)
            found = f"{to_new:.2g} nats a token from policy {policy.version}"
            found += "" if to_parent is None else f", {to_parent:.2g} from the one before"
            if evidence == "refuted":
                raise _NotShown(f"after the reload the engine is {found}; swap.tolerance is {self.tolerance:.2g}")
            if not error <= self.tolerance:
                raise _NotShown(f"after the reload the prefix cache is stale: {error:.2g} nats a token")
            compared = self._compare(policy, new, found) if evidence == "unclear" else None
        except BaseException:
            self.stop()
            raise
        self._loaded, self._canaries = True, new
        return SwapReport(
            policy=policy.version,
            method="canaries" if compared is None else "weights",
            seconds=time.monotonic() - began,
            seconds_to_first_token=first,
            to_new=to_new,
            to_parent=to_parent,
            gap=gap,
            noise=self._noise,
            prefix_error=error,
            compared=compared,
            restarted=False,
        )

    def _compare(self, policy: Policy, new: Canaries, found: str) -> int | None:
        """How many weights of the engine are exactly the checkpoint's; raises _NotShown when one is not.

        None where they cannot be compared (several GPUs share them): reloaded over zeros, they can be no others.
        """
        result = self._order("compare_weights", path=policy.path)
        if result["supported"]:
            if result["max_abs_diff"] > 0:
                raise _NotShown(
                    f"weights in the engine differ from the checkpoint's by up to {result['max_abs_diff']:.2g}"
                )
            compared: int = result["compared"]
            return compared
        if not self._order("forget")["supported"]:
            raise _NotShown(f"canaries cannot tell ({found}) and weights cannot be compared: {result['why']}")
        self._order("reload", path=policy.path)
        self._order("reset")
        to_new = distance(self._score(new), new.logps, new.token_ids)
        if not to_new <= self.tolerance:
            raise _NotShown(
                f"reloaded over zeros the engine is {to_new:.2g} nats a token from policy {policy.version}; swap.tolerance "
                f"is {self.tolerance:.2g}"
            )
        return None

    def _restart_with(self, policy: Policy, manifest: Manifest, began: float, why: str) -> SwapReport:
        """A fresh engine with the new weights, once; a failure leaves none running."""
        self.stop()
        self._tell(
            "swap_restart", f"policy {policy.version} could not be swapped in ({why}); starting a new engine with it"
        )
        try:
            self._load(policy, manifest)
        except (ChildDied, ChildError, _NotShown) as failure:
            self.policy = self.verified
            raise SwapError(
                f"policy {policy.version} could not be shown to be in the engine: {why}; then in a new engine: {failure}",
                f"see {self._log}",
            ) from failure
        seconds = time.monotonic() - began
        return SwapReport(
            policy=policy.version,
            method="restart",
            seconds=seconds,
            seconds_to_first_token=seconds,
            to_new=self._noise,
            to_parent=None,
            gap=None,
            noise=self._noise,
            prefix_error=None,
            compared=None,
            restarted=True,
        )

    def _prefix_canary(self, canaries: Canaries) -> dict[str, Any]:
        assert self.info is not None
        prompt_ids = prefix_prompt(canaries.token_ids, self.info.block_size, self.info.max_model_len)
        return {"prompt_ids": prompt_ids, "seed": 0, "n": CANARY_TOKENS}

    def _prefix_error(self, canaries: Canaries) -> float:
        """Generate across several blocks, score the same tokens without the prefix cache, and compare (nats a token)."""
        canary = self._prefix_canary(canaries)
        said = self._order("canary_generate", **canary)
        (scored,) = self._logps([(canary["prompt_ids"] + said["token_ids"], len(canary["prompt_ids"]))])
        return prefix_error(said["logps"], scored)

    def _score(self, canaries: Canaries) -> list[float]:
        return self._logps([(ids, 1) for ids in canaries.token_ids])

    def _logps(
        self, sequences: Sequence[tuple[list[int], int]], on_progress: Callable[[int], None] | None = None
    ) -> list[float]:
        wire = [{"token_ids": ids, "start": start} for ids, start in sequences]
        found: list[float] = self._order("logps", _on_done(on_progress), sequences=wire)
        assert len(found) == len(sequences) and all(map(math.isfinite, found))
        return found

    def _order(self, order: str, on_event: Callable[[Event], None] | None = None, **fields: Any) -> Any:
        assert self._child is not None
        return self._child.order(order, on_event, **fields)

    def _manifest(self, policy: Policy) -> Manifest:
        """The run's manifest of the policy, every file of it checked. A source folder's own, of another run, has no say."""
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
