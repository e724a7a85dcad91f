"""Rounds on the miniature of the tiny world, in the smallest sizes: real engine, real reward server, real training."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfplay.config import Config, load
from selfplay.errors import StageFailed
from selfplay.processes.reaping import marked
from selfplay.reporting.terminal import Display
from selfplay.rounds.round import run_round
from selfplay.rounds.run import Run
from selfplay.storage import tables

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
        "generate.engine.cpu_kv_cache_gib=0.125",
        "pairs.keep=1.0",
        "train.batch_pairs=8",
        "train.micro_batch_pairs=8",
        "train.save_steps=1",
        "evaluate.judge=null",  # one server fewer
        "evaluate.prompts=24",
        "evaluate.audit_prompts=16",
        "evaluate.gate.win_rate_lower=0.0",  # what the gate decides is tested apart; here every round has to move on
        "evaluate.gate.reward_up=false",
        "evaluate.gate.max_length_ratio=9",
        "evaluate.gate.max_cut_off=1.0",
    ]


RULES = "selfplay.worlds.tiny.rewriter:rewrite"
CALM = (
    "breadth.method=clusters",
    "evolve.every=1",
    f"evolve.rewriter={RULES}",
    "train.reference=initial",
    "pairs.implicit=dpo",
)
"""What the run of the fixture `calm` has beside the overrides: stages that are off by default, and a reference that stays."""


def config(world: Path, *more: str) -> Config:
    return load(TINY, [*overrides(world), *more])


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


class Command:
    """`scripts/round.py` on the miniature, as a user would type it."""

    def __init__(self, world: Path, run_dir: Path, *args: str) -> None:
        self.run_dir = run_dir
        argv = [
            sys.executable,
            str(ROOT / "scripts" / "round.py"),
            "--config",
            str(TINY),
            "--run-dir",
            str(run_dir),
            *sets(*overrides(world)),
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

    def children(self, module: str) -> list[int]:
        """The processes of the run that run `python -m module` themselves, not their guards."""
        return [pid for pid, words in commands(self.run_dir) if words[1:3] == ["-m", module]]

    def kill_child(self, module: str) -> None:
        """SIGKILL a process of the run, once it is there."""
        self.until(lambda: self.children(module), f"a process {module}")
        os.kill(self.children(module)[0], signal.SIGKILL)


class Opened:
    """A run that stays open in the test's own process, so that engine and reward server start once for many rounds."""

    def __init__(self, world: Path, run_dir: Path, *settings: str) -> None:
        self._world, self._settings, self._said = world, settings, io.StringIO()
        self.run = Run(config(world, *settings), run_dir, Display(Console(file=self._said, width=200)))

    def round(self, *settings: str) -> str:
        """Go on with the open round, or do the next one, under these settings; what was printed, on one line."""
        self.run.config = self.run.trainer.config = config(self._world, *self._settings, *settings)
        self.run.require()
        self.run.display.round_table(run_round(self.run))
        return self._heard()

    def failure(self, *settings: str) -> str:
        """The same for a round that fails: with exit code 3, were it a command, and with no trainer left behind."""
        with pytest.raises(StageFailed) as error:
            self.round(*settings)
        assert error.value.exit_code == 3
        assert not [pid for pid, words in commands(self.run.dir) if "selfplay.training.trainer" in words]
        self.run.display.error(error.value)
        return self._heard()

    def _heard(self) -> str:
        said = self._said.getvalue()
        self._said.seek(0)
        self._said.truncate()
        return " ".join(said.split())


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


def rows(run_dir: Path, index: int, name: str, kind: type) -> list[Any]:
    """The rows of an artifact, `<stage>/<file>`, of a round."""
    return tables.read_rows(run_dir / "rounds" / f"{index:04d}" / f"{name}.parquet", kind)


def state(run_dir: Path) -> dict[str, bytes]:
    """Every artifact that two equal runs share to the byte: rows, verdicts, prompts, weights."""
    patterns = (
        "rounds/*/*/*.parquet",
        "rounds/*/*/verdict.json",
        "pool/**/*.arrow",
        "pool/**/*.parquet",
        "policies/*/*.safetensors",
    )
    return {str(f.relative_to(run_dir)): f.read_bytes() for pattern in patterns for f in run_dir.glob(pattern)}
