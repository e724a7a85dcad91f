"""Tokens a second of the stage `generate` beside those of vLLM alone with all prompts at once.

The stage goes through the generator, its child, shards and files, as in a round. vLLM alone gets the same prompts, seeds and
settings in the same engine (alone.py), and nothing is written. Answers end at some of the tokens, so their lengths are very
different. The two take turns, each time with an empty prefix cache, and the last turn counts: by then kernels are made.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from gpu_kit import checkpoints
from gpu_kit.part import Findings
from gpu_kit.sizes import Sizes
from gpu_kit.sleep_and_swap import settings
from selfplay.config import Config
from selfplay.generation import installing, sampling
from selfplay.generation.generator import Generator
from selfplay.processes.child import Child
from selfplay.seeds import derive
from selfplay.storage import folders, tables
from selfplay.types import Prompt

TURNS = 3


class Known(Child):
    """The engine's process, which a generator keeps to itself."""

    last: ClassVar[Child]

    def start(self) -> None:
        Known.last = self
        super().start()


class Quiet:
    """A line of progress that nobody reads."""

    round_index: int | None = None
    name, unit, text, done, seconds = "generate", "prompts", "", 0, 0.0
    total: int | None = None

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        pass


def measure(sizes: Sizes, work: Path, findings: Findings) -> None:
    run_dir = work / "throughput"
    checkpoint, config = checkpoints.policy_folder(sizes, work), settings(sizes, run_dir)
    canaries = checkpoints.sequences(sizes, sizes.canaries, sizes.canary_tokens, seed=0)
    policy = checkpoints.policy(run_dir, 0, checkpoint, canaries)
    ids = checkpoints.sequences(sizes, sizes.throughput_prompts, sizes.prompt_tokens, seed=6)
    rows = [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=each, split="train") for i, each in enumerate(ids)]
    tables.write_rows(run_dir / "prompts.parquet", rows, Prompt)
    folders.write_json(run_dir / "alone.json", alone(config, rows))
    installing.ENGINE = ("-m", "gpu_kit.alone")
    installing.Child = Known  # type: ignore[misc]
    generator = Generator(config, run_dir, run_dir / "generator.log")
    try:
        generator.load(policy)
        for turn in range(1, TURNS + 1):
            Known.last.order("reset")
            ours = tell(findings, f"stage generate, turn {turn}", **stage(config, run_dir, generator, turn))
            Known.last.order("reset")
            theirs = Known.last.order("alone", job=str(run_dir / "alone.json"))
            raw = tell(findings, f"vLLM alone, turn {turn}", **theirs)
    finally:
        generator.stop()
    findings.tell("stage generate ÷ vLLM alone, the last turn", tokens_a_second=ours / raw)


def seed(prompt_id: str) -> int:
    return derive("gpu_kit", prompt_id)


def stage(config: Config, run_dir: Path, generator: Generator, turn: int) -> dict[str, Any]:
    """Seconds of the stage, and the tokens of each answer."""
    out, began = run_dir / f"turn-{turn}", time.monotonic()
    out.mkdir()
    sampling.generate(
        out,
        Quiet(),
        prompts=run_dir / "prompts.parquet",
        generator=generator,
        settings=config.generate,
        seed=seed,
        shards=out / "shards",
        breathe=lambda kind: None,
    )
    seconds = time.monotonic() - began
    return {"seconds": seconds, "lengths": tables.read_array(out / "candidates.parquet", "n_tokens").tolist()}


def alone(config: Config, rows: list[Prompt]) -> dict[str, Any]:
    """What vLLM alone is asked, as the stage asks it."""
    return {
        "prompts": [row.prompt_ids for row in rows],
        "seeds": [seed(row.prompt_id) for row in rows],
        "candidates": config.generate.candidates,
        "max_tokens": config.generate.max_tokens,
        "stop_token_ids": config.generate.stop_token_ids,
    }


def tell(findings: Findings, what: str, *, seconds: float, lengths: list[int]) -> float:
    """Tell what a turn took; returns its tokens a second."""
    tokens = sum(lengths)
    findings.tell(
        what,
        answers=len(lengths),
        tokens=tokens,
        shortest=min(lengths),
        longest=max(lengths),
        seconds=seconds,
        tokens_a_second=tokens / seconds,
    )
    return tokens / seconds
