"""A configuration that a running service takes over: what may change while it runs, and what may not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from selfplay.config import Config, load
from selfplay.errors import InputError
from selfplay.service.due import trigger

AT_START = ("host", "port", "hosts", "proxies", "connections", "token_env", "token_file")
"""Settings of the section `service` that are read at the start alone."""


def read_anew(
    path: Path, overrides: Sequence[str], old: Config, run_dir: Path, given_dir: Path | None, now: datetime
) -> Config:
    """The configuration file as it is now. Raises InputError or ConfigError where it cannot take the place of `old`.

    run_dir: the folder that the service runs in; given_dir: the same, where it was given beside the configuration.
    """
    new = load(path, list(overrides))
    before, fixed = old.fixed(), new.fixed()
    if changed := [key for key in before if before[key] != fixed[key]]:
        raise InputError(f"{', '.join(changed)} cannot change within a run; the old configuration stays")
    changed = [f"service.{name}" for name in AT_START if getattr(new.service, name) != getattr(old.service, name)]
    changed += [
        f"run.{name}" for name in ("locks", "lease_seconds") if getattr(new.run, name) != getattr(old.run, name)
    ]
    if (given_dir or new.run_dir) != run_dir:
        changed = ["run.dir or run.name", *changed]
    if new.cluster != old.cluster:
        changed.append("cluster")
    if changed:
        raise InputError(f"{', '.join(changed)} cannot change while the service runs: stop it, then start it anew")
    trigger(new.schedule, now)  # a cron line that is none is found now
    return new
