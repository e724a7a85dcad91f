"""Rounds one at a time, as a command: `scripts/round.py` and `selfplay round` are this function."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from selfplay.processes.places import take_own_umask
from selfplay.visible import filter_stderr, say, visible

if TYPE_CHECKING:
    from selfplay.rounds.run import Run
    from selfplay.storage.ledger import Store


def run_rounds(
    config: str | Path,
    overrides: Sequence[str] = (),
    run_dir: Path | None = None,
    total: int | None = None,
    report: bool = False,
) -> int:
    """Complete an unfinished round, then do rounds until the folder has `total` (None: one more than now).

    Returns the exit code: 0 promoted, rejected by the gate or skipped; 2 bad configuration or input; 3 a stage failed; 130
    interrupted.
    """
    from selfplay.errors import ConfigError, SelfplayError
    from selfplay.processes.logs import open_log
    from selfplay.reporting.terminal import Display
    from selfplay.storage.ledger import LedgerError

    filter_stderr()
    take_own_umask()
    display, interrupt = Display(), Interrupt()
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT too: a shell starts background jobs with it ignored
        signal.signal(number, interrupt)
    try:
        from selfplay.config import load
        from selfplay.rounds.run import Run
        from selfplay.storage.folders import disk_errors

        if total is not None and total < 1:
            raise ConfigError(f"--rounds {total}: at least 1")
        settings = load(config, overrides)
        run_dir = run_dir or settings.run_dir
        with disk_errors(run_dir), Run(settings, run_dir, display) as run, disk_errors(run_dir):
            run.breathe = interrupt.again
            _rounds(run, total, display.run_table)
            if report:
                run.write_report()
        return 0
    except SelfplayError as error:
        display.error(error)
        return error.exit_code
    except LedgerError as error:
        display.error(
            f"the ledger of {run_dir} cannot be used: {error.orig}",
            "end what else works on its ledger.sqlite (a backup, a database shell), or restore one that is damaged from a "
            "backup, then run the same command again: finished stages are kept",
        )
        return 3
    except KeyboardInterrupt:
        display.note("interrupted: the same command goes on where this one stopped")
        return 130
    except Exception as error:
        from selfplay.storage.outside import explained

        known = explained(error)
        log = (run_dir or Path()) / "logs" / "round.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.unlink(missing_ok=True)
            with open_log(log) as file:
                file.write(visible(traceback.format_exc()).encode())
        except OSError:
            if known is None:
                traceback.print_exc()
        if known is not None:
            display.error(known)
        else:
            display.error(f"{type(error).__name__}: {error}", "this is a bug: please report it with the log", log)
        return 3


def _rounds(run: Run, total: int | None, show_table: Callable[[Store], None]) -> None:
    """`show_table`: shows the last rounds of a run that has all its rounds already."""
    from selfplay.rounds.round import publish_current, run_round

    publish_current(run, retry=True)
    unfinished = run.store.unfinished() is not None
    finished = sum(run.store.count_rounds().values()) - unfinished
    target = finished + 1 if total is None else total
    left = max(target - finished, int(unfinished))
    if not left:
        run.display.note(f"{run.dir} has its {target} rounds already")
        show_table(run.store)
    for _ in range(left):
        run.display.round_table(run_round(run))


def take_over(config: Path, overrides: Sequence[str], run_dir: Path) -> None:
    """Register as the runner of a folder, and leave it again: it is a copy, or its runner was on another machine, and a person
    says that nobody else is at work in it. Raises InputError where somebody is."""
    from selfplay.config import load
    from selfplay.storage.ledger import Store
    from selfplay.storage.lock import RunLock

    settings = load(config, overrides).run
    with RunLock(run_dir, settings.locks, settings.lease_seconds, say, take_over=True) as lock:
        Store(run_dir, lock).close()
    say(f"{run_dir} is a run of its own now, and the next start goes on with it")


def leave(code: int) -> NoReturn:
    """End the process at once: threads that wait for answers nobody wants any more must not hold up the exit."""
    with contextlib.suppress(OSError):  # a full disk, or a reader that has gone
        sys.stdout.flush()
    os._exit(code)


class Interrupt:
    """A signal handler that raises KeyboardInterrupt, and again at the next stage, shard or step.

    What a handler raises is lost where it runs under a callback of C code, which has nobody to tell.
    """

    def __init__(self) -> None:
        self._asked = False

    def __call__(self, *_: object) -> None:
        self._asked = True
        raise KeyboardInterrupt

    def again(self, where: str) -> None:
        """As `Run.breathe`."""
        if self._asked:
            raise KeyboardInterrupt
