"""`selfplay check`: would these rounds run on this machine? Looks, and starts nothing heavy."""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from selfplay.checks import machine as check_machine
from selfplay.checks import models as check_models
from selfplay.checks import reward as check_reward
from selfplay.checks import webhook as check_webhook
from selfplay.checks.finding import Finding, Level
from selfplay.config import Config
from selfplay.errors import InputError, SelfplayError
from selfplay.prompts import importer
from selfplay.reporting import trackers
from selfplay.rounds.run import load_function
from selfplay.service.daemon import next_start
from selfplay.storage.ledger import RunLock, Store
from selfplay.web import access


def check(config: Config, run_dir: Path) -> list[Finding]:
    """Everything that can be known before a round without loading a model: model folders and their context, batches,
    prompts, reward, run folder, schedule, tracker, functions, token, port, webhook, disk, memory, GPUs."""
    looks: list[tuple[str, Callable[[Config, Path], Iterator[Finding]]]] = [
        ("models", check_models.folders), ("context", check_models.context), ("training", _training),
        ("prompts", _prompts), ("reward", check_reward.sources), ("run folder", _run_folder), ("schedule", _schedule),
        ("track", _track), ("functions", _functions), ("token", _token), ("port", _port), ("webhook", check_webhook.answers),
        ("disk", check_machine.disk), ("memory", check_machine.memory), ("gpu", check_machine.gpus),
    ]  # fmt: skip
    found: list[Finding] = []
    for name, look in looks:
        try:
            found += look(config, run_dir)
        except (SelfplayError, OSError, ValueError) as error:
            hint = getattr(error, "hint", "")
            found.append(Finding(about=name, level="error", text=f"{error}{'; ' if hint else ''}{hint}"))
        except Exception as error:  # the boundary: one look that fails must not hide the others
            found.append(Finding(about=name, level="error", text=f"{type(error).__name__}: {error}"))
    return found


def _training(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the batch can be shared among the trainer's processes."""
    settings = config.train
    if settings.accelerate is None:
        return
    if not settings.accelerate.is_file():
        yield Finding(about="train.accelerate", level="error", text=f"{settings.accelerate}: no such file")
        return
    processes = check_machine.launched(config).processes
    together = settings.micro_batch_pairs * processes
    said = f"{settings.batch_pairs} pairs a step on {processes} processes, {settings.micro_batch_pairs} at a time each"
    if settings.batch_pairs % together:
        yield Finding(about="train.batch_pairs", level="error", text=f"{said}: not a multiple of {together}")
    else:
        yield Finding(about="training", level="ok", text=said)


def _prompts(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Files are read and split as the import does it; only how long a prompt is, the policy's tokenizer tells later."""
    settings, evaluation = config.prompts, config.evaluate
    for key, source in (("prompts.source", settings.source), ("prompts.heldout", settings.heldout)):
        if source is None or Path(source).is_file():
            continue
        if Path(source).suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/")):
            yield Finding(about=key, level="error", text=f"{source}: no such file")
        else:
            yield Finding(about=key, level="ok", text=f"{source}: taken for a Hub dataset, loaded at the start")
    if not all(Path(source).is_file() for source in (settings.source, settings.heldout) if source is not None):
        return
    pool, counts = importer.build_pool(config, lambda messages: [])
    splits = Counter[str](prompt.split for prompt in pool)
    aside = ", ".join(f"{n} × {why}" for why, n in counts.items())
    bad = counts.keys() - {"duplicate", "also held out"}
    yield Finding(
        about="prompts",
        level="warning" if bad else "ok",
        text=f"{splits['train']:,} to train on, {splits['heldout']:,} held out, {splits['audit']:,} in the audit set"
        + (f"; set aside: {aside}" if aside else "")
        + "; those over prompts.max_tokens go too",
    )
    asked = [
        ("train", "prompts.per_round", settings.per_round, "every round draws them all"),
        ("heldout", "evaluate.prompts", evaluation.prompts, "the gate decides on fewer, with less power"),
    ]
    if evaluation.audit_every:
        asked.append(("audit", "evaluate.audit_prompts", evaluation.audit_prompts, "the audit has fewer"))
    for split, key, wanted, then in asked:
        if splits[split] < wanted:
            yield Finding(about=key, level="warning", text=f"{wanted:,}, but there are {splits[split]:,}: {then}")


def _run_folder(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the folder can be written to, belongs to this run, and nobody works in it."""
    there = next(p for p in [run_dir, *run_dir.resolve().parents] if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Finding(about="run folder", level="error", text=f"{run_dir}: user {os.getuid()} cannot write to {there}")
        return
    if not (run_dir / "ledger.sqlite").is_file():
        yield Finding(about="run folder", level="ok", text=f"{run_dir}: new")
        return
    if (run_dir / "pool").is_dir():  # before the import nothing is fixed
        store = Store(run_dir)
        try:
            store.open_run(config.run.name, config.fixed())
        finally:
            store.close()
    try:
        with RunLock(run_dir):
            yield Finding(about="run folder", level="ok", text=f"{run_dir}: of this run, and free")
    except InputError as error:
        yield Finding(about="run folder", level="warning", text=str(error))


def _schedule(config: Config, run_dir: Path) -> Iterator[Finding]:
    settings, now = config.schedule, datetime.now(UTC)
    if settings.mode == "continuous":
        yield Finding(about="schedule", level="ok", text="a round follows a round")
        return
    first = next_start(settings, None, now, now, 0.0).astimezone(ZoneInfo(settings.time_zone))
    yield Finding(
        about="schedule", level="ok", text=f"{settings.mode}: if it began now, first at {first:%Y-%m-%d %H:%M %Z}"
    )


def _track(config: Config, run_dir: Path) -> Iterator[Finding]:
    trackers.require(config.track)
    yield Finding(about="track", level="ok", text=config.track)


def _functions(config: Config, run_dir: Path) -> Iterator[Finding]:
    rewriter = None if config.evolve.rewriter == "policy" else config.evolve.rewriter
    for key, name in (("evaluate.gold", config.evaluate.gold), ("evolve.rewriter", rewriter)):
        if name is not None:
            load_function(key, name)
            yield Finding(about=key, level="ok", text=f"{name} can be imported")


def _token(config: Config, run_dir: Path) -> Iterator[Finding]:
    token = access.read_token(config.service)
    said = (
        "API and page ask for it"
        if token
        else f"none, and none is needed: only this machine reaches {config.service.host}"
    )
    yield Finding(about="token", level="ok", text=said)


def _port(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Binds as the server does: an earlier service's closing connections are no hindrance."""
    where = f"{config.service.host}:{config.service.port}"
    family, kind, protocol, _, address = socket.getaddrinfo(
        config.service.host, config.service.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen()
        except OSError as error:
            level: Level = "warning" if error.errno == errno.EADDRINUSE else "error"
            ask = " (is the service running?)" if level == "warning" else ""
            reason = os.strerror(error.errno or 0)
            yield Finding(about="port", level=level, text=f"{where} cannot be taken: {reason}{ask}")
        else:
            yield Finding(about="port", level="ok", text=f"{where} is free")
