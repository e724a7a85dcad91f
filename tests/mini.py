"""A round on the miniature of the tiny world, in the smallest sizes: real engine, real reward server, real training."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from selfplay.children import marked
from selfplay.config import Config, load

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"


def overrides(world: Path) -> list[str]:
    return [
        f"policy.model={world / 'policy'}",
        f"reward.model={world / 'reward'}",
        f"prompts.source={world / 'train.jsonl'}",
        f"prompts.heldout={world / 'heldout.jsonl'}",
        "prompts.per_round=32",
        "generate.candidates=4",
        "generate.shard_prompts=8",
        "pairs.keep=1.0",
        "train.batch_pairs=8",
        "train.micro_batch_pairs=8",
        "train.save_steps=1",
        "evaluate.prompts=24",
        "evaluate.audit_prompts=16",
        "evaluate.gate.win_rate_lower=0.0",  # what the gate decides is tested apart; here every round has to move on
        "evaluate.gate.reward_up=false",
        "evaluate.gate.max_length_ratio=9",
        "evaluate.gate.max_cut_off=1.0",
    ]


def config(world: Path, *more: str) -> Config:
    return load(TINY, [*overrides(world), *more])


class Command:
    """`scripts/round.py` on the miniature, as a user would type it."""

    def __init__(self, world: Path, run_dir: Path, *args: str) -> None:
        self.run_dir = run_dir
        sets = [word for override in overrides(world) for word in ("--set", override)]
        argv = [
            sys.executable,
            str(ROOT / "scripts" / "round.py"),
            "--config",
            str(TINY),
            "--run-dir",
            str(run_dir),
            *sets,
            *args,
        ]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, timeout: float = 600) -> tuple[int, str]:
        """Exit code and all that was printed, on one line."""
        try:
            out, _ = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, " ".join(out.split())

    def until(self, condition: Callable[[], object], what: str, timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.process.communicate()[0]}"
            assert time.monotonic() < deadline, f"{what} never happened"
            time.sleep(0.01)

    def kill_child(self, module: str) -> None:
        """SIGKILL the process of the run that runs `python -m module` itself, not its guard."""

        def found() -> list[int]:
            return [pid for pid, words in commands(self.run_dir) if words[1:3] == ["-m", module]]

        self.until(found, f"a process {module}")
        os.kill(found()[0], signal.SIGKILL)


def commands(run_dir: Path) -> list[tuple[int, list[str]]]:
    found = []
    for pid in marked(run_dir):
        try:
            found.append((pid, Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]))
        except OSError:
            continue
    return found


def nothing_left(run_dir: Path, within: float = 20.0) -> bool:
    deadline = time.monotonic() + within
    while marked(run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(run_dir)
