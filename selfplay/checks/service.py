"""Looks at what the service needs: its run folder, schedule and tracker, and the token and the port of API and page."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.errors import InUseError
from selfplay.service.due import next_start
from selfplay.storage import agreement, filesystem
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.manifests import require_nothing_made
from selfplay.tracking import trackers
from selfplay.web import access


def run_folder(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the folder can be written to, belongs to this run, and nobody works in it."""
    filesystem.require(run_dir, config.run.locks)
    if not (run_dir / "ledger.sqlite").is_file():
        require_nothing_made(run_dir, "is gone")
        yield Finding.ok("run folder", f"{run_dir} is new")
        return
    store = Store(run_dir)
    try:
        if (run_dir / "pool").is_dir():  # before the import nothing is fixed
            store.open_run(config.run.name, config.fixed())
            if (wrong := next(agreement.disagreements(store, run_dir), None)) is not None:
                yield Finding.error("run folder", f"{wrong.path}: {wrong.what}; {wrong.right}; {agreement.DOCTOR}")
                return
        RunLock.of(config.run, run_dir).look(store)
        yield Finding.ok("run folder", f"{run_dir} belongs to this run, and nobody works in it")
    except InUseError as error:
        yield Finding.warning("run folder", f"{error}; {error.hint}")
    finally:
        store.close()


def schedule(config: Config, run_dir: Path) -> Iterator[Finding]:
    """When the first round would start."""
    settings, now = config.schedule, datetime.now(UTC)
    if settings.mode == "continuous":
        yield Finding.ok("schedule", "continuous: the next round starts when one ends")
        return
    first = next_start(settings, None, now, now, 0.0).astimezone(ZoneInfo(settings.time_zone))
    said = f"{settings.mode}: a service that started now would begin its first round at {first:%Y-%m-%d %H:%M %Z}"
    yield Finding.ok("schedule", said)


def tracker(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the tracker's package is installed, and has the key that it needs."""
    trackers.require(config.track)
    yield Finding.ok("track", config.track)


def token(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether there is a token where others can reach the page."""
    if access.read_token(config.service):
        yield Finding.ok("token", "the API and the page ask for it")
    else:
        yield Finding.ok("token", f"there is none, and none is needed: only this machine reaches {config.service.host}")


def port(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the port is free. It is bound as the server does it: connections that are closing are no hindrance."""
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
            said = f"{where} cannot be taken: {os.strerror(error.errno or 0)}"
            if error.errno == errno.EADDRINUSE:
                yield Finding.warning("port", f"{said} (is the service running?)")
            else:
                yield Finding.error("port", said)
        else:
            yield Finding.ok("port", f"{where} is free")
