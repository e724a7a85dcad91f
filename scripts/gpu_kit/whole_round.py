"""A whole round through `selfplay round`: LoRA in bfloat16, engine and trainer on one GPU, a reward model beside them.

The engine sleeps while the trainer works, as in configs/one-gpu.yaml. Prompts, policy and reward model are synthetic, so the
seconds and the memory mean something, and what is learnt does not. The gate lets everything through, so that the new weights
are swapped in. The bounds on noise are wide, since random networks exaggerate it: they are what is to be measured.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gpu_kit import checkpoints, memory
from gpu_kit.part import Findings
from gpu_kit.sizes import Sizes
from selfplay.storage.ledger import Store

SAMPLE = 0.2  # seconds between two looks at the memory
TOLD = (
    "generate/tokens", "generate/tokens_per_second", "train/seconds_load", "train/seconds_train", "train/seconds_export",
    "train/steps", "train/agreement_mean", "train/agreement_p99", "train/update_relative_norm",
)  # fmt: skip


def measure(sizes: Sizes, work: Path, findings: Findings) -> None:
    config, run_dir = work / "round.yaml", work / "round"
    config.write_text(yaml.safe_dump(settings(sizes, work), sort_keys=False), encoding="utf-8")
    argv = [sys.executable, "-m", "selfplay.cli", "round", "--config", str(config), "--run-dir", str(run_dir)]
    began = time.monotonic()
    process = subprocess.Popen([*argv, "--rounds", "1"], stdin=subprocess.DEVNULL)
    watch = Watch(run_dir, findings)
    while process.poll() is None:
        time.sleep(SAMPLE)
        watch.look()
    watch.look()
    if process.returncode:
        raise RuntimeError(f"selfplay round ended with code {process.returncode}")
    watch.close(time.monotonic() - began)


class Watch:
    """Tells each stage of the run as soon as the ledger has it, with the least memory that was free meanwhile."""

    def __init__(self, run_dir: Path, findings: Findings) -> None:
        self._run_dir, self._findings = run_dir, findings
        self._store: Store | None = None
        self._told: set[str] = set()
        self._free: list[tuple[datetime, float]] = []

    def look(self) -> None:
        self._free.append((datetime.now(UTC), memory.free()))
        if self._store is None and (self._run_dir / "ledger.sqlite").is_file():
            self._store = Store(self._run_dir)
        if self._store is None:
            return
        for row in self._store.query("SELECT stage, ended, seconds FROM stages WHERE round = 1 ORDER BY rowid"):
            if row["stage"] not in self._told:
                self._told.add(row["stage"])
                self._findings.tell(f"stage {row['stage']}", seconds=row["seconds"], GiB_free_at_least=self._least(row))

    def _least(self, stage: dict[str, Any]) -> float | None:
        ended = datetime.fromisoformat(stage["ended"])
        within = [free for at, free in self._free if -SAMPLE <= (ended - at).total_seconds() <= stage["seconds"]]
        return min(within, default=None)

    def close(self, seconds: float) -> None:
        """What the round says of itself at its end. `seconds`: of the command, imports and engine start included."""
        assert self._store is not None, "a round has a ledger"
        metrics = self._store.metrics(1)
        told = {name.replace("/", ": ").replace("_", " "): metrics[name] for name in TOLD if name in metrics}
        swaps = {name: value for name, value in metrics.items() if "swap" in name}
        self._findings.tell(
            "round",
            verdict=str(self._store.round(1)["state"]),
            seconds_of_the_command=seconds,
            seconds_of_its_stages=sum(self._store.seconds(1).values()),
            GiB_free_at_least=min(free for _, free in self._free),
            **told,
            **swaps,
        )
        restarts = [e["text"] for e in self._store.events() if e["kind"].endswith("_restart")]
        self._findings.tell("restarts", count=len(restarts), why="; ".join(restarts) or "none")
        self._store.close()


def settings(sizes: Sizes, work: Path) -> dict[str, Any]:
    """The configuration of the round, and the files that it names."""
    words = sizes.prompt_tokens // 4 - 2  # a word of four letters and the space before it are up to four tokens
    for name, count, seed in (("train", 4 * sizes.round_prompts, 3), ("heldout", 4 * sizes.heldout_prompts, 4)):
        checkpoints.write_prompts(work / f"{name}.jsonl", count, words, seed)
    length = sizes.prompt_tokens + sizes.answer_tokens
    return {
        "run": {"name": "round", "dir": str(work)},
        "policy": {"model": str(checkpoints.policy_folder(sizes, work)), "dtype": "bfloat16"},
        "prompts": {
            "source": str(work / "train.jsonl"),
            "heldout": str(work / "heldout.jsonl"),
            "per_round": sizes.round_prompts,
            "max_tokens": sizes.prompt_tokens,
        },
        "generate": {
            "candidates": sizes.candidates,
            "max_tokens": sizes.answer_tokens,
            "stop_token_ids": checkpoints.stop_tokens(sizes),
            "shard_prompts": max(sizes.round_prompts // 4, 1),
            "engine": {"gpu_memory_utilization": 0.5, "max_num_seqs": sizes.max_num_seqs},
        },
        "reward": {"model": str(checkpoints.reward_folder(sizes, work)), "dtype": "bfloat16"},
        "pairs": {"keep": 0.8},
        "depth": {"method": "gradient", "pairs_per_prompt": 2, "dim": 256},
        "train": {
            "lora": {"r": sizes.rank, "alpha": 2 * sizes.rank},
            "learning_rate": 1e-4,
            "batch_pairs": sizes.batch_pairs,
            "micro_batch_pairs": 2,
            "max_length": length,
            "beta": 0.05,
            "bf16": True,
            "gradient_checkpointing": True,
            "agreement_mean": 0.2,
            "agreement_p99": 1.0,
        },
        "evaluate": {
            "prompts": sizes.heldout_prompts,
            "audit_every": 0,
            "gate": {"win_rate_lower": 0, "reward_up": False, "max_kl": 1e6, "max_length_ratio": 99, "max_cut_off": 1},
        },
        "swap": {"tolerance": 0.2},
        "placement": {"colocated": True},
        "track": "none",
    }
