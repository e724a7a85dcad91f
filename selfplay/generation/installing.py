"""One engine's process, and how weights get into it: what was loaded or reloaded is shown to be there before it answers.

Nothing here starts an engine again (`supervised.py` does) or decides which policy is to serve (`generator.py`).
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.errors import ConfigError
from selfplay.generation.swap import (
    CANARY_BLOCKS,
    SEEDS,
    Canaries,
    SwapReport,
    canary_tokens,
    distance,
    fresh_tolerance,
    judge,
    prefix_error,
    prefix_prompt,
    tolerance,
)
from selfplay.processes import cores, gpus
from selfplay.processes.child import Child
from selfplay.processes.places import HERE, Place
from selfplay.processes.protocol import Event
from selfplay.storage import checkpoints, seen
from selfplay.types import Policy

# What Python runs in the child. A measurement puts an engine without a model in its place.
ENGINE: tuple[str, ...] = ("-m", "selfplay.generation.engine")
USUAL_BLOCK = 32  # tokens in a block of the KV cache, for as long as no engine runs that could tell


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


class NotShown(Exception):
    """The weights in the engine could not be shown to be the wanted ones."""


class WarmEngine:
    """The process of one vLLM engine, with the policy whose weights were shown to be in it.

    Orders raise ChildError where one fails and ChildDied where the process ends. Not for use from several threads at a time.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        log: Path,
        name: str = "generator",
        gpus: Sequence[int] | None = None,
        place: Place = HERE,
    ) -> None:
        """`gpus`: those of this engine; None for all that are visible. `place`: where it runs."""
        self.config, self.log, self.name, self.gpus, self._place = config, log, name, gpus, place
        self.child: Child | None = None
        self.info: EngineInfo | None = None  # of the process that was loaded last, also after its end
        self.loaded = False  # verified weights are in it (asleep or not)
        self.asleep: int | None = None  # the level of its sleep
        self.policy: Policy | None = None  # whose weights are in it
        self.canaries: Canaries | None = None  # of that policy
        self._run_dir = run_dir
        self._started = 0.0
        # Nats a token, of the engine against the policy that it was started with, and against itself without its prefix cache.
        self.noise, self._prefix_noise = 0.0, 0.0
        self._fresh = True  # the noise is not known yet

    def tolerance(self, canaries: Canaries) -> float:
        """The largest distance (nats a token) from the canaries at which the weights count as shown."""
        return self._bound(self.noise, min(len(ids) - 1 for ids in canaries.token_ids))

    @property
    def prefix_tolerance(self) -> float:
        """The largest distance (nats a token) between what is generated after a cached prefix and its score without the cache."""
        return self._bound(self._prefix_noise, self._canary_tokens)

    def _bound(self, noise: float, tokens: int) -> float:
        dtype = self.config.policy.dtype
        return self.config.swap.tolerance or (
            fresh_tolerance(dtype) if self._fresh else tolerance(dtype, noise, tokens)
        )

    @property
    def _canary_tokens(self) -> int:
        return canary_tokens(self.config.policy.dtype)

    # its life

    def start(self) -> None:
        """Start the process, whose imports take seconds, unless there is one; returns at once."""
        if self.child is not None:
            return
        engine = self.config.generate.engine
        argv = [sys.executable, *ENGINE]
        argv += [
            "--cpu-threads",
            str(cores.engine_threads(self.config)),
            "--cpu-kv-cache-gib",
            str(engine.cpu_kv_cache_gib),
        ]
        self.child = Child(
            self.name,
            argv,
            run_dir=self._run_dir,
            log=self.log,
            env=gpus.environment(self.gpus),
            silence=engine.silence,
            place=self._place,
        )
        self._started, self.loaded, self.asleep = time.monotonic(), False, None
        self.child.start()

    def stop(self) -> None:
        """End the process. Safe to call at any time."""
        if self.child is not None:
            self.child.stop()
        self.child, self.loaded, self.asleep = None, False, None

    def files(self, paths: Iterable[Path]) -> dict[str, Any]:
        """A field of an order: files that this process has checked, for an engine elsewhere, which may see others."""
        return {} if self._place is HERE else {seen.FILES: seen.told(paths)}

    def order(self, order: str, on_event: Callable[[Event], None] | None = None, **fields: Any) -> Any:
        assert self.child is not None
        return self.child.order(order, on_event, **fields)

    def sleep(self, level: int) -> bool:
        """Give the accelerator's memory back; False where the platform has no such thing."""
        if self.asleep is None:
            self.asleep = level if self.order("sleep", level=level)["supported"] else None
        return self.asleep is not None

    def logps(self, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
        """Summed log-probabilities (nats) of the tokens start … T−1 of each (token_ids, start), for few of them."""
        wire = [{"token_ids": ids, "start": start} for ids, start in sequences]
        found: list[float] = self.order("logps", sequences=wire)
        assert len(found) == len(sequences) and all(map(math.isfinite, found))
        return found

    # weights

    def load(self, policy: Policy, canaries: Canaries, model: dict[str, Any]) -> None:
        """Load `policy` into a fresh process and measure the engine's noise against its canaries.

        `model` is the policy's config.json. Raises NotShown, ConfigError, ChildError or ChildDied, and leaves no process then.
        """
        config, context = self.config, self._context(model, canaries)
        self._fresh = True
        self.start()
        assert self.child is not None
        try:
            self.child.wait_for("ready")
            found = self.order(
                "load",
                model=policy.path,
                dtype=config.policy.dtype,
                seed=config.run.seed % 2**31,
                max_model_len=context,
                max_num_seqs=config.generate.engine.max_num_seqs,
                gpu_memory_utilization=config.generate.engine.gpu_memory_utilization,
                tensor_parallel=config.generate.engine.tensor_parallel,
                nodes=config.engine_nodes,
                trust_remote_code=config.policy.trust_remote_code,
                sleep_mode=config.placement.colocated,
                **self._files_of(policy),
            )
            seconds = time.monotonic() - self._started
            names = ("vllm", "dtype", "device", "block_size", "max_model_len", "eos_ids", "supports_sleep")
            self.info = EngineInfo(**{name: found[name] for name in names}, start_seconds=seconds)
            self.noise = distance(self._score(canaries), canaries.logps, canaries.token_ids)
            self._prefix_noise = self._prefix_error(canaries)
            if not max(self.noise, self._prefix_noise) <= (bound := self.tolerance(canaries)):
                raise NotShown(
                    f"a fresh engine is {self.noise:.2g} nats a token from the canaries of policy {policy.version}, and "
                    f"{self._prefix_noise:.2g} from itself with and without its prefix cache; swap.tolerance is {bound:.2g}"
                )
            self._fresh = False
        except BaseException:
            self.stop()
            raise
        self.loaded, self.policy, self.canaries = True, policy, canaries

    def install(self, policy: Policy, new: Canaries, parent: Canaries | None, began: float) -> SwapReport:
        """Reload in place and verify. Raises NotShown, ChildError or ChildDied, and leaves no process then.

        `new` are the canaries of the policy. `parent` are those of the policy that was in the engine, None where no other
        weights can be in it. `began` is when the swap began, by time.monotonic().
        """
        self.loaded = False
        try:
            if self.asleep is not None:
                self.order("wake", tags=["weights"])
            else:  # This fills the prefix cache, so that a stale one shows.
                self.order("canary_generate", **self._prefix_canary(new))
            self.order("reload", path=policy.path, **self._files_of(policy))
            if self.asleep is not None:
                self.order("wake", tags=["kv_cache"])
            self.order("reset")
            self.asleep = None
            error = self._prefix_error(new)
            first = time.monotonic() - began
            bound = self.tolerance(new)
            evidence, to_new, to_parent, gap = judge(self._score(new), new, parent, self.noise, bound)
            found = f"{to_new:.2g} nats a token from policy {policy.version}"
            found += "" if to_parent is None else f", {to_parent:.2g} from the one before"
            if evidence == "refuted":
                raise NotShown(f"after the reload the engine is {found}; swap.tolerance is {bound:.2g}")
            if not error <= self.prefix_tolerance:
                raise NotShown(f"after the reload the prefix cache is stale: {error:.2g} nats a token")
            compared = self._compare(policy, new, found) if evidence == "unclear" else None
        except BaseException:
            self.stop()
            raise
        self.loaded, self.policy, self.canaries = True, policy, new
        return SwapReport(
            policy=policy.version,
            method="canaries" if compared is None else "weights",
            seconds=time.monotonic() - began,
            seconds_to_first_token=first,
            to_new=to_new,
            to_parent=to_parent,
            gap=gap,
            noise=self.noise,
            prefix_error=error,
            compared=compared,
            restarted=False,
        )

    def restarted(self, policy: Policy, began: float) -> SwapReport:
        """The report of a swap for which a fresh engine was loaded."""
        seconds = time.monotonic() - began
        return SwapReport(
            policy=policy.version,
            method="restart",
            seconds=seconds,
            seconds_to_first_token=seconds,
            to_new=self.noise,
            to_parent=None,
            gap=None,
            noise=self.noise,
            prefix_error=None,
            compared=None,
            restarted=True,
        )

    def _compare(self, policy: Policy, new: Canaries, found: str) -> int | None:
        """How many weights of the engine are exactly the checkpoint's; raises NotShown when one is not.

        Where weights cannot be compared, since several GPUs share them, they are reloaded over zeros: then they can be no
        others. The answer is None there.
        """
        result = self.order("compare_weights", path=policy.path, **self._files_of(policy))
        if result["supported"]:
            if result["max_abs_diff"] > 0:
                raise NotShown(
                    f"weights in the engine differ from the checkpoint's by up to {result['max_abs_diff']:.2g}"
                )
            compared: int = result["compared"]
            return compared
        if not self.order("forget")["supported"]:
            raise NotShown(f"canaries cannot tell ({found}) and weights cannot be compared: {result['why']}")
        self.order("reload", path=policy.path, **self._files_of(policy))
        self.order("reset")
        to_new = distance(self._score(new), new.logps, new.token_ids)
        if not to_new <= (bound := self.tolerance(new)):
            raise NotShown(
                f"reloaded over zeros the engine is {to_new:.2g} nats a token from policy {policy.version}; swap.tolerance "
                f"is {bound:.2g}"
            )
        return None

    def _files_of(self, policy: Policy) -> dict[str, Any]:
        """A field of an order: the files of a policy that an engine reads."""
        return self.files(Path(policy.path) / name for name in checkpoints.read(Path(policy.path)).files())

    def _context(self, model: dict[str, Any], canaries: Canaries) -> int:
        """Context of the engine (tokens): room for a prompt, its response, one scored token more, and the canaries."""
        config = self.config
        needed = config.prompts.max_tokens + config.longest_answer
        room = 1 + max(len(ids) for ids in canaries.token_ids)
        limit = model.get("max_position_embeddings")
        context = config.generate.engine.max_model_len
        if context is None:
            context = max(needed + 1, (CANARY_BLOCKS + 1) * USUAL_BLOCK + self._canary_tokens, room)
            context = min(context, limit) if isinstance(limit, int) else context
        if context < max(needed + 1, room):
            raise ConfigError(
                f"the engine's context is {context} tokens; prompts.max_tokens + generate.max_tokens (or a suite's) + 1 take "
                f"{needed + 1}, the canaries {room}",
                f"the model's own limit is {limit}: lower the first two, or raise generate.engine.max_model_len",
            )
        return context

    def _prefix_canary(self, canaries: Canaries, seed: int = 0) -> dict[str, Any]:
        assert self.info is not None
        context = self.info.max_model_len
        n = min(self._canary_tokens, max(context // 2, 1))
        return {"prompt_ids": prefix_prompt(canaries.token_ids, self.info.block_size, context, n), "seed": seed, "n": n}

    def _prefix_error(self, canaries: Canaries) -> float:
        """Generate across several blocks, score the same tokens without the prefix cache, and compare (nats a token).

        Noise may be past the bound by chance, and a stale cache is past it with every seed: the median of several counts then.
        """
        errors: list[float] = []
        for seed in range(SEEDS):
            canary = self._prefix_canary(canaries, seed)
            said = self.order("canary_generate", **canary)
            (scored,) = self.logps([(canary["prompt_ids"] + said["token_ids"], len(canary["prompt_ids"]))])
            errors.append(prefix_error(said["logps"], scored))
            if errors[0] <= self.prefix_tolerance:
                break
        return statistics.median(errors)

    def _score(self, canaries: Canaries) -> list[float]:
        return self.logps([(ids, 1) for ids in canaries.token_ids])
