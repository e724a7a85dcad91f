"""Puts the simulation where the service meets the outside: files, ledger, clock, threads and children."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa

from selfplay.config import Config, load, secrets
from selfplay.generation import groups
from selfplay.processes import children
from selfplay.prompts import draws
from selfplay.rounds import ahead, frame, requirements, round, run, steps, turns
from selfplay.service import daemon, reload, stalls, stop
from selfplay.storage import closed, filesystem, folders, hashes, ledger, reader, runner, schema
from simulation import database, paths, processes, stages, texts
from simulation.disk import REAL, REMOVE, Disk
from simulation.threads import CLOCK, THREADING

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = (
    ("schedule.mode=continuous",),
    ("schedule.mode=interval", "schedule.every_minutes=30"),
    ("schedule.mode=cron", "schedule.cron=10 */2 * * *", "schedule.missed=skip"),
)
VARIANTS = (
    ("retention.last=1", "retention.rejected_rounds=1", "retention.candidates_rounds=1"),
    ("retention.last=0", "retention.rejected_rounds=0", "service.pause_after_rejected=1"),
    ("retention.last=2", "retention.rejected_rounds=2", "service.retries=0", "schedule.ahead=0"),
)
"""What the configuration becomes in turn, when somebody edits it and has it read anew."""
AHEAD = ("schedule.ahead=1",)
KEPT = {"policy", "retention", "schedule", "service"}
"""The sections that the ledger keeps of a configuration: that which the importer reads, and those in which they differ."""
BASE = (
    "evaluate.judge=null", "evaluate.gold=null", "track=none", "guard.history=1", "pairs.history=0", "reward.cache.entries=0",
    "prompts.per_round=3", "service.retries=2", "service.pause_after_rejected=2", "service.retry_seconds=60",
)  # fmt: skip


class Configs:
    """The configurations, each read once."""

    def __init__(self, model: Path) -> None:
        fixed = [*BASE, f"policy.model={model}"]
        self._known = [
            [
                [load(ROOT / "configs" / "tiny.yaml", [*fixed, *schedule, *ahead, *variant]) for variant in VARIANTS]
                for ahead in ((), AHEAD)
            ]
            for schedule in SCHEDULES
        ]
        self.schedule = 0
        self.ahead = False

    def __call__(self, path: Path, overrides: list[str]) -> Config:
        return self._known[self.schedule][self.ahead][CLOCK.world.variant % len(VARIANTS)]


class Inline:
    """As `ThreadPoolExecutor`, in the thread of the caller."""

    def __init__(self, workers: int) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, what: Callable[..., Any], *values: Any) -> Iterator[Any]:
        return map(what, *values)


def once(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method or a function of a configuration, which does not change, asked once for each."""
    known: dict[Any, tuple[Any, Any]] = {}

    def found(config: Any, **how: Any) -> Any:
        key = (id(config), *how.items())
        if key not in known:
            known[key] = config, method(config, **how)  # it is kept, so that no other one gets its number
        return known[key][1]

    return found


def once_begun(simulated: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a trial of the file system where a history begins with a folder that was tried before."""
    return here(lambda *a: (simulated if CLOCK.world.begun else real)(*a), real)


def lacks(there: Path, *rest: Any) -> list[tuple[str, bool]]:
    """As `filesystem.lacks` of a file system that lacks nothing, with the moments of the trial."""
    with folders.disk_errors(there / "run"):
        for _ in range(6):
            CLOCK.world.moment("write", "a trial of the file system")
    return []


def here(simulated: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a function of the product, in the thread of the history alone. What other threads of the process do is no
    part of it: they get the real one."""
    return lambda *a, **k: (simulated if get_ident() == CLOCK.thread else real)(*a, **k)


def on_disk(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for a method of `Path`, or a function of one: that of the disk of the history, in its thread."""
    simulated = getattr(Disk, name)

    def done(path: Path, *a: Any, **k: Any) -> Any:
        return simulated(CLOCK.world.disk, path, *a, **k) if get_ident() == CLOCK.thread else real(path, *a, **k)

    return done


@contextlib.contextmanager
def installed(model: Path) -> Iterator[Configs]:
    """The product in the simulation, for the time of the block. `model`: the folder of the initial policy."""
    configs, dump = Configs(model), Config.model_dump
    disk: Callable[[], Any] = lambda: CLOCK.world.disk  # noqa: E731
    on_path = {name: on_disk(name, REAL[name]) for name in ("rename", "write_text", "unlink", "symlink_to", "mkdir")}
    clock = SimpleNamespace(monotonic=CLOCK.monotonic)
    places: list[tuple[Any, str, Any]] = [
        *((Path, name, function) for name, function in on_path.items()),
        *paths.PLACES,
        *texts.PLACES,
        (shutil, "rmtree", here(lambda *a, **k: disk().rmtree(*a, **k), REMOVE)),
        (shutil, "disk_usage", here(lambda path: disk().usage, shutil.disk_usage)),
        (folders, "sync", on_disk("sync", folders.sync)),
        (filesystem, "LOCKS", ()),  # those of the folder itself are taken all the same
        (filesystem, "lacks", once_begun(lacks, filesystem.lacks)),
        (filesystem, "odd", once_begun(lambda run_dir: None, filesystem.odd)),
        (filesystem, "clean", once_begun(lambda folder: None, filesystem.clean)),
        (hashes, "ThreadPoolExecutor", Inline),
        (sa, "create_engine", here(lambda *a, **k: database.ENGINE, sa.create_engine)),
        (sa.event, "listen", here(lambda *a: None, sa.event.listen)),
        (ledger, "migrate", here(lambda *a: len(schema.MIGRATIONS), schema.migrate)),
        *((module, "now", here(CLOCK.now, module.now)) for module in (ledger, reader, closed)),
        *((module, "time", clock) for module in (daemon, stalls, frame, round, turns, children)),
        (daemon, "threading", THREADING),
        (stalls, "threading", THREADING),
        (stop, "threading", THREADING),
        (daemon, "load", configs),
        (reload, "load", configs),
        (Config, "fingerprint", once(Config.fingerprint)),
        (Config, "fixed", once(Config.fixed)),
        (Config, "model_dump", once(lambda config, **how: dump(config, include=KEPT, **how))),
        (Config, "reward_sources", once(Config.reward_sources)),
        (requirements, "named", once(secrets.named)),
        (run, "shares_gpus", once(groups.shares_gpus)),
        *((runner, name, functools.cache(getattr(runner, name))) for name in ("_line", "_started", "_namespace")),
        (daemon, "tables", SimpleNamespace(give_back_memory=lambda: None)),
        (run.Run, "require", lambda run: None),
        (run, "reap", lambda folder: 0),
        (run, "Generator", processes.Generator),
        (run, "Trainer", processes.Trainer),
        (run, "Scorer", processes.Scorer),
        (run, "ask_importer", processes.ask_importer),
        (run, "packages", lambda: {}),
        (run, "sealing", SimpleNamespace(begins=lambda folder, _: not folder.is_dir(), open_pool=lambda *_: None)),
        (run, "Pool", stages.SimulatedPool),
        (run, "intake", SimpleNamespace(admit=stages.admit, add=stages.add)),
        (steps, "size", lambda path: 1000),
        (draws, "tables", SimpleNamespace(read_column=stages.read_column)),
        (round, "read_ranked", stages.read_ranked),
        (ahead, "sample", stages.sample),
        (round, "Steps", stages.SimulatedSteps),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in places:
            stack.enter_context(patch.object(owner, name, value))
        yield configs
