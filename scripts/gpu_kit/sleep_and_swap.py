"""The engine's sleep, the swap in place and the noise of bfloat16, on the controller's own `WarmEngine`.

Every wake and every swap is verified by canaries, as in a run. Where the default tolerance refuses, that is told, and all that
follows is measured with a wide one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gpu_kit import checkpoints, memory, noise
from gpu_kit.part import Findings
from gpu_kit.sizes import Sizes
from selfplay.config import Config
from selfplay.generation.installing import NotShown, WarmEngine
from selfplay.generation.swap import Canaries, SwapReport, distance
from selfplay.storage import folders, policies
from selfplay.types import Policy

SHARE = 0.5  # of the GPU's memory for vLLM; the trainer's models lie beside it
WIDE = 1.0  # nats a token


def measure(sizes: Sizes, work: Path, findings: Findings) -> None:
    run_dir = work / "sleep-and-swap"
    began = time.monotonic()
    ids = checkpoints.sequences(sizes, sizes.canaries, sizes.canary_tokens, seed=0)
    made = [checkpoints.policy_folder(sizes, work), checkpoints.updated_folder(sizes, work)]
    both = [checkpoints.policy(run_dir, version, folder, ids) for version, folder in enumerate(made)]
    size = sum(file.stat().st_size for file in made[0].glob("*.safetensors"))
    findings.tell(
        "model and its update",
        parameters=size // 2,
        seconds=time.monotonic() - began,
    )
    bench = Bench(sizes, run_dir, both, findings)
    try:
        for level in (2, 1):
            with findings.step(f"sleep level {level}"):
                bench.sleep(level)
        with findings.step("sleep level 1, woken without a reload"):
            bench.wake_alone()
        for number in range(1, sizes.swaps + 1):
            for new, old in ((1, 0), (0, 1)):
                with findings.step(f"swap {number}, policy {old} → {new}"):
                    bench.swap(f"swap {number}, policy {old} → {new}", new, old)
        with findings.step("noise"):
            noise.measure(sizes, made[0], bench.ready(0), findings)
    finally:
        bench.engine.stop()


class Bench:
    """A warm engine with one of two policies in it; where a step ended it, the next one starts it again."""

    def __init__(self, sizes: Sizes, run_dir: Path, both: list[Policy], findings: Findings) -> None:
        self._both, self._findings = both, findings
        self._canaries = [Canaries.of(policies.read(run_dir / "policies" / f"{p.version:04d}").canaries) for p in both]
        self._model: dict[str, Any] = folders.read_json(Path(both[0].path) / "config.json")
        self.engine = WarmEngine(settings(sizes, run_dir), run_dir, run_dir / "generator.log")
        self._in = 0  # the policy in the engine

    def ready(self, version: int) -> WarmEngine:
        """The engine, awake, with this policy in it."""
        if not self.engine.loaded:
            before, began = memory.free(), time.monotonic()
            try:
                self._load(version)
            except NotShown as refused:
                self._loosen("engine start", refused)
                before, began = memory.free(), time.monotonic()
                self._load(version)
            seconds, self._in = time.monotonic() - began, version
            self._findings.tell(
                "engine start",
                seconds=seconds,
                GiB_free_before=before,
                GiB_free_awake=memory.free(),
                nats_from_canaries=self._distance(),
            )
        if self._in != version or self.engine.asleep is not None:
            self._install(version, None)
        return self.engine

    def _loosen(self, what: str, refused: NotShown) -> None:
        """Tell that the default tolerance refused, and go on with a wide one."""
        self._findings.tell(f"{what} with the default tolerance", refused=str(refused))
        self.engine.config = Config.model_validate(self.engine.config.model_dump() | {"swap": {"tolerance": WIDE}})

    def sleep(self, level: int) -> None:
        engine = self.ready(0)
        awake, began = memory.free(), time.monotonic()
        supported = engine.sleep(level)
        seconds, asleep = time.monotonic() - began, memory.free()
        report = self._install(0, None)
        self._findings.tell(
            f"sleep level {level}",
            supported=supported,
            GiB_free_awake=awake,
            GiB_free_asleep=asleep,
            GiB_free_again=memory.free(),
            seconds_to_sleep=seconds,
            seconds_to_wake=report.seconds,
            nats_from_canaries=report.to_new,
        )

    def wake_alone(self) -> None:
        """Level 1 keeps the weights in main memory: what would a wake cost that does not read them from disk?"""
        engine = self.ready(0)
        supported = engine.sleep(1)
        began = time.monotonic()
        engine.order("wake", tags=["weights", "kv_cache"])
        engine.order("reset")
        seconds, engine.asleep = time.monotonic() - began, None
        self._findings.tell(
            "sleep level 1, woken without a reload",
            supported=supported,
            seconds_to_wake=seconds,
            nats_from_canaries=self._distance(),
        )

    def swap(self, what: str, new: int, old: int) -> None:
        self.ready(old)
        try:
            report = self._install(new, self._canaries[old])
        except NotShown as refused:
            self._loosen(what, refused)
            self.ready(old)
            report = self._install(new, self._canaries[old])
        self._findings.tell(
            what,
            shown_by=report.method,
            seconds=report.seconds,
            seconds_to_first_token=report.seconds_to_first_token,
            nats_from_new=report.to_new,
            nats_from_old=report.to_parent,
            nats_between=report.gap,
            noise=report.noise,
            prefix_error=report.prefix_error,
        )

    def _load(self, version: int) -> None:
        self.engine.load(self._both[version], self._canaries[version], self._model)

    def _install(self, version: int, parent: Canaries | None) -> SwapReport:
        report = self.engine.install(self._both[version], self._canaries[version], parent, time.monotonic())
        self._in = version
        return report

    def _distance(self) -> float:
        """Largest distance (nats a token) of the engine from the canaries of the policy in it."""
        canaries = self._canaries[self._in]
        scored = self.engine.logps([(ids, 1) for ids in canaries.token_ids])
        return distance(scored, canaries.logps, canaries.token_ids)


def settings(sizes: Sizes, run_dir: Path) -> Config:
    """The configuration of an engine that shares its GPU, and of nothing else."""
    engine = {"gpu_memory_utilization": SHARE, "max_num_seqs": sizes.max_num_seqs}
    return Config.model_validate(
        {
            "run": {"name": run_dir.name, "dir": str(run_dir.parent)},
            "policy": {"model": "unused", "dtype": "bfloat16"},
            "prompts": {"source": "unused", "max_tokens": sizes.prompt_tokens},
            "generate": {
                "candidates": sizes.throughput_candidates,
                "max_tokens": sizes.answer_tokens,
                "stop_token_ids": checkpoints.stop_tokens(sizes),
                "engine": engine,
            },
            "reward": {"url": ["http://unused"]},
            "placement": {"colocated": True},
        }
    )
