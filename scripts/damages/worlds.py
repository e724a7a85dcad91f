"""The two run folders that are damaged, made on the miniature of the tiny world."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from chaos import ROOT, world

from selfplay.processes.reaping import marked

SETTINGS = [
    "prompts.per_round=32", "generate.candidates=4", "generate.shard_prompts=8", "generate.engine.cpu_kv_cache_gib=0.125",
    "pairs.keep=1.0", "train.batch_pairs=8", "train.micro_batch_pairs=8", "train.save_steps=1", "evaluate.judge=null",
    "evaluate.prompts=24", "evaluate.audit_prompts=16", "evaluate.audit_every=1", "evaluate.gate.win_rate_lower=0.0",
    "evaluate.gate.reward_up=false", "evaluate.gate.max_length_ratio=9", "evaluate.gate.max_cut_off=1.0", "evolve.every=1",
    "evolve.rewriter=selfplay.worlds.tiny.rewriter:rewrite",
]  # fmt: skip
LONGEST = 900.0  # seconds


def make(out: Path) -> tuple[Path, Path]:
    """A folder with two finished rounds, and a copy of it whose third round was killed after the second save of its trainer."""
    finished, is_open = out / "finished", out / "open"
    for folder in (finished, is_open):
        shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(_command(finished, 2), check=True, cwd=ROOT, timeout=LONGEST)
    shutil.copytree(finished, is_open, symlinks=True)
    process = subprocess.Popen(_command(is_open, 3), cwd=ROOT)
    until = time.monotonic() + LONGEST
    while not list(is_open.glob("rounds/0003/train.work/checkpoint-2/epsilon_dpo.json")):
        assert process.poll() is None and time.monotonic() < until, "the trainer has not saved twice"
        time.sleep(0.02)
    process.kill()
    process.wait()
    while marked(is_open):  # its guards end its children
        time.sleep(0.05)
    return finished, is_open


def _command(run_dir: Path, rounds: int) -> list[str]:
    settings = [word for each in [*world(), *SETTINGS] if "judge.model" not in each for word in ("--set", each)]
    argv = [sys.executable, "-m", "selfplay.cli", "round", "--config", str(ROOT / "configs" / "tiny.yaml")]
    return [*argv, "--run-dir", str(run_dir), "--rounds", str(rounds), *settings]
