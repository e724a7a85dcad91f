"""`selfplay check --deep`: one round in the smallest size, by the real stages and processes, in a folder that is removed.

It asks what a look cannot know: whether the engine loads beside the trainer, whether rewards come, whether a step fits into
the memory, and whether the new weights can be shown to be in the engine.
"""

from __future__ import annotations

import contextlib
import glob
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfplay.checks.finding import Finding
from selfplay.config import Config, GuardConfig
from selfplay.errors import SelfplayError, StageFailed
from selfplay.processes.reaping import reap
from selfplay.progress import Display
from selfplay.rounds.round import run_round
from selfplay.rounds.run import Run
from selfplay.storage.lock import RunLock
from selfplay.training import launch
from selfplay.types import RoundReport

PROMPTS, ANSWERS = 4, 2
LOG_LINES = 20  # of the log of what failed, because the log is removed with the folder


def deep(config: Config, run_dir: Path, display: Display) -> list[Finding]:
    """Do the round, with lines of progress, and say what it showed. Raises what a round raises.

    The folder lies beside the run folder, on the same disk. What a killed check left there is ended and removed first.
    """
    with _scratch(config, run_dir) as folder:
        try:
            with Run(smallest(config), folder, display) as run:
                return list(_shown(run_round(run)))
        except StageFailed as error:
            if error.log is not None and error.log.is_file():
                lines = error.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
                display.note("\n".join([f"the end of {error.log.name}, which is removed:", *lines]))
                error.log = None
            if error.hint.endswith("finished stages are kept"):
                error.hint = "mend it, and try again"
            raise


def smallest(config: Config) -> Config:
    """The same configuration for a round of few prompts and one optimizer step of the configured micro-batches.

    What decides on memory stays as it is: models, engine, lengths, micro-batches, processes and placement.
    """
    together = config.train.micro_batch_pairs * launch.read(config.train.accelerate).processes
    unlimited: dict[str, Any] = {name: {} for name, limits in GuardConfig() if name not in ("history", "probes")}
    changed: dict[str, dict[str, Any]] = {
        "prompts": {"per_round": PROMPTS},
        "breadth": {"clusters": None},
        "evolve": {"every": 0},
        "generate": {"candidates": ANSWERS, "shard_prompts": PROMPTS},
        "guard": unlimited | {"probes": 0},  # few answers say nothing about a reward
        "pairs": {"keep": 1.0, "easiest": 1.0},
        "train": {
            "epochs": 1, "schedule": "constant",
            "batch_pairs": together * math.ceil(PROMPTS / together), "replay": 0.0, "min_update": 0.0,
        },
        "evaluate": {"prompts": PROMPTS, "audit_every": 0, "suites": []},
        "schedule": {"ahead": 0},
    }  # fmt: skip
    given = config.model_dump(mode="json")
    given["reward"]["cache"]["path"] = None  # a cache that runs share is not to learn from this
    given |= {"track": "none", "publish": {}}  # nobody else is to hear of it
    for section, values in changed.items():
        given[section] |= values
    return Config.model_validate(given)


@contextlib.contextmanager
def _scratch(config: Config, run_dir: Path) -> Iterator[Path]:
    """A folder for a run beside another one, which is removed at the end with the folders that were made for it."""
    parent = run_dir.parent
    made = [above for above in (parent, *parent.parents) if not above.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{run_dir.name}.deep-"
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        try:
            with RunLock.of(config.run, left):
                reap(left)
        except SelfplayError:  # another check works there
            continue
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for above in made:
            with contextlib.suppress(OSError):  # another process has put something there meanwhile
                above.rmdir()


def _shown(report: RoundReport) -> Iterator[Finding]:
    found, seconds = report.metrics, sum(report.seconds.values())
    answers, cut = found["generate/candidates"], found["generate/cut_off_share"]
    said = f"{answers:.0f} answers were sampled and scored, {cut:.0%} of them cut off"
    yield Finding.ok("deep", f"{said}; mean reward {found['score/reward_mean']:.3g}; {seconds:.0f} s in stages")
    if report.outcome == "skipped":
        yield Finding.warning("deep", f"training was not tried: {'; '.join(report.reasons)}")
        return
    swap = "the new weights were shown to be in the engine, and candidate and champion were judged"
    yield Finding.ok("deep", f"one optimizer step on {found['depth/pairs']:.0f} pairs; {swap}")
