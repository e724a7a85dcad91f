#!/usr/bin/env python
"""What the stage `generate` costs the controller: `python scripts/scale/generation.py [--prompts 8192 --candidates 8]`.

The real generator and the real stage speak with an engine that has no model and answers at once (`fake_engine.py`). The
engine is a process of its own, so its processor time does not count. One line of JSON is printed.

    cpu             processor seconds of this process in all its threads, for the whole stage
    sample_cpu      of these, until the last shard is on disk; the rest joins the shards and counts
    logps_cpu       processor seconds for the log-probabilities of all answers under another policy
    grown_mb        how far the peak of the resident memory rose above what it was before the stage
    megabytes       size of candidates.parquet
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

from selfplay.config import Config  # noqa: E402
from selfplay.generation import installing, sampling  # noqa: E402
from selfplay.generation.generator import Generator  # noqa: E402
from selfplay.progress import Line  # noqa: E402
from selfplay.seeds import derive  # noqa: E402
from selfplay.storage import answers, checkpoints, folders, policies, tables  # noqa: E402
from selfplay.types import Policy, Prompt  # noqa: E402

FAKE_ENGINE = (str(Path(__file__).with_name("fake_engine.py")),)
PROMPT_TOKENS, MAX_TOKENS = 200, 1024
CANARIES = [[1, *range(10 + i, 30 + i)] for i in range(4)]


def measure(prompts: int, candidates: int, shard_prompts: int = 64) -> dict[str, float]:
    """The figures of the module's docstring for so many prompts with so many candidates each."""
    installing.ENGINE = FAKE_ENGINE
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        first, second = (write_policy(run_dir, version) for version in (1, 2))
        asked = write_prompts(run_dir / "prompts.parquet", prompts)
        settings = {"candidates": candidates, "max_tokens": MAX_TOKENS, "shard_prompts": shard_prompts}
        config = Config.model_validate(
            {
                "run": {"name": run_dir.name, "dir": str(run_dir.parent)},
                "policy": {"model": "unused", "dtype": "float32"},
                "prompts": {"source": "unused", "max_tokens": PROMPT_TOKENS},
                "generate": settings,
                "reward": {"url": ["http://unused"]},
            }
        )
        generator = Generator(config, run_dir, run_dir / "generator.log")
        try:
            generator.load(first)
            watch = Watch()
            _forget_peak()
            before, began = _memory("VmRSS"), time.process_time()
            sampling.generate(
                run_dir,
                watch,
                prompts=asked,
                generator=generator,
                settings=config.generate,
                seed=lambda prompt_id: derive("generate", prompt_id),
                shards=run_dir / "shards",
                breathe=lambda kind: None,
            )
            cpu, grown = time.process_time() - began, _memory("VmHWM") - before
            generator.swap(second)
            logps_began = time.process_time()
            file = run_dir / "candidates.parquet"
            generator.answer_logps(asked, file, 0, prompts * candidates, candidates)
            logps_cpu = time.process_time() - logps_began
        finally:
            generator.stop()
        return {
            "prompts": prompts,
            "candidates": candidates,
            "cpu": cpu,
            "sample_cpu": watch.last - began,
            "logps_cpu": logps_cpu,
            "grown_mb": grown,
            "megabytes": file.stat().st_size / 1e6,
        }


class Watch(Line):
    """A line of progress that remembers the processor time at which a number of finished prompts was last told."""

    round_index: int | None = None
    name, unit, text, seconds = "generate", "prompts", "", 0.0
    done = 0
    total: int | None = None
    last = 0.0

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        if done is not None:
            self.last = time.process_time()


def write_policy(run_dir: Path, version: int) -> Policy:
    """A policy that the engine without a model takes for one: a tensor, a config.json and a manifest with canaries."""
    from safetensors.numpy import save_file

    path = run_dir / "policies" / f"{version:04d}"
    path.mkdir(parents=True)
    save_file({"weight": np.full(4, version, np.float32)}, path / "model.safetensors")
    folders.write_json(path / "config.json", {"model_type": "none", "max_position_embeddings": 4096})
    manifest = policies.Manifest(
        version=version,
        parent=None,
        round=version,
        beta=None,
        reference=None,
        reference_sha256=None,
        fingerprint="",
        packages={},
        update={},
        files=checkpoints.hashed(path),
        canaries={"token_ids": CANARIES, "logps": [-20.0 - version] * len(CANARIES)},
    )
    folders.write_json(path / folders.MANIFEST, dataclasses.asdict(manifest))
    return Policy(version=version, path=str(path), parent=None, round=version, beta=None, reference=None)


def write_prompts(path: Path, count: int) -> Path:
    """A file of so many prompts of PROMPT_TOKENS tokens; returns its path."""
    rng = np.random.default_rng(0)
    with tables.writing(path, Prompt) as file:
        for start in range(0, count, 4096):
            numbers = range(start, min(start + 4096, count))
            ids = [rng.integers(3, 150_000, PROMPT_TOKENS, np.int32) for _ in numbers]
            messages = [[{"role": "user", "content": f"What is {i}?"}] for i in numbers]
            rows = pa.table({"prompt_id": [f"{i:016x}" for i in numbers], "messages": messages})
            for name, values in (("prompt_ids", answers.ids_column(ids)), ("split", ["train"] * len(ids))):
                rows = rows.append_column(name, pa.array(values))
            for field in tables.schema(Prompt):
                if field.name not in rows.column_names:
                    rows = rows.append_column(field, pa.nulls(len(ids), field.type))
            file.table(rows)
    return path


def _memory(field: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def _forget_peak() -> None:
    """Let the kernel count the peak of the resident memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8192)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--shard-prompts", type=int, default=64)
    args = parser.parse_args()
    tables.leave_pandas_out()
    found = measure(args.prompts, args.candidates, args.shard_prompts)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
