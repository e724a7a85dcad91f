"""Tokens a second of the stage `generate` beside those of vLLM alone with all prompts at once.

The stage goes through the generator, its child, shards and files, as in a round. vLLM alone gets the same prompts, seeds and
settings, and nothing is written. Answers end at some of the tokens, so their lengths are very different. Each side answers
everything twice, and the second time counts: then kernels are made and prompts are cached, on both sides.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from gpu_kit import checkpoints
from gpu_kit.part import Findings
from gpu_kit.sizes import Sizes
from gpu_kit.sleep_and_swap import settings
from selfplay.config import Config
from selfplay.generation import sampling
from selfplay.generation.generator import Generator
from selfplay.seeds import derive
from selfplay.storage import folders, tables
from selfplay.types import Prompt

PASSES = (1, 2)


class Quiet:
    """A line of progress that nobody reads."""

    round_index: int | None = None
    name, unit, text, done, seconds = "generate", "prompts", "", 0, 0.0
    total: int | None = None

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        pass


def measure(sizes: Sizes, work: Path, findings: Findings) -> None:
    run_dir = work / "throughput"
    checkpoint = checkpoints.policy_folder(sizes, work)
    config = settings(sizes, run_dir)
    ids = checkpoints.sequences(sizes, sizes.throughput_prompts, sizes.prompt_tokens, seed=6)
    rows = [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=each, split="train") for i, each in enumerate(ids)]
    speeds: dict[str, float] = {}
    with findings.step("stage generate"):
        speeds["stage"] = stage(config, run_dir, checkpoint, rows, sizes, findings)
    with findings.step("vLLM alone"):
        speeds["alone"] = alone(config, run_dir, checkpoint, rows, findings)
    if len(speeds) == 2:
        findings.tell("stage generate ÷ vLLM alone", tokens_a_second=speeds["stage"] / speeds["alone"])


def seed(prompt_id: str) -> int:
    return derive("gpu_kit", prompt_id)


def stage(
    config: Config, run_dir: Path, checkpoint: Path, rows: list[Prompt], sizes: Sizes, findings: Findings
) -> float:
    """Tokens a second of the last pass."""
    canaries = checkpoints.sequences(sizes, 1, sizes.canary_tokens, seed=0)
    policy = checkpoints.policy(run_dir, 0, checkpoint, canaries)
    asked = run_dir / "prompts.parquet"
    tables.write_rows(asked, rows, Prompt)
    generator = Generator(config, run_dir, run_dir / "generator.log")
    try:
        generator.load(policy)
        for number in PASSES:
            out, began = run_dir / f"pass-{number}", time.monotonic()
            out.mkdir()
            sampling.generate(
                out,
                Quiet(),
                prompts=asked,
                generator=generator,
                settings=config.generate,
                seed=seed,
                shards=out / "shards",
                breathe=lambda kind: None,
            )
            seconds = time.monotonic() - began
            lengths = tables.read_array(out / "candidates.parquet", "n_tokens")
            speed = tell(findings, f"stage generate, pass {number}", lengths.tolist(), seconds)
    finally:
        generator.stop()
    return speed


def alone(config: Config, run_dir: Path, checkpoint: Path, rows: list[Prompt], findings: Findings) -> float:
    """Tokens a second of the last pass. It runs in a process that has imported neither torch nor CUDA before."""
    job = run_dir / "alone.json"
    generate = config.generate
    folders.write_json(
        job,
        {
            "model": str(checkpoint),
            "dtype": config.policy.dtype,
            "max_num_seqs": generate.engine.max_num_seqs,
            "gpu_memory_utilization": generate.engine.gpu_memory_utilization,
            "max_model_len": config.prompts.max_tokens + generate.max_tokens + 1,
            "prompts": [row.prompt_ids for row in rows],
            "seeds": [seed(row.prompt_id) for row in rows],
            "candidates": generate.candidates,
            "max_tokens": generate.max_tokens,
            "stop_token_ids": generate.stop_token_ids,
            "passes": len(PASSES),
        },
    )
    subprocess.run([sys.executable, "-m", "gpu_kit.alone", str(job)], check=True)
    for number, done in zip(PASSES, folders.read_json(job.with_suffix(".found.json")), strict=True):
        speed = tell(findings, f"vLLM alone, pass {number}", done["lengths"], done["seconds"])
    return speed


def tell(findings: Findings, what: str, lengths: list[int], seconds: float) -> float:
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
