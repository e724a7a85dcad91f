"""What failed, in words and in a log, and when it is tried again."""

from __future__ import annotations

import contextlib
import traceback
from datetime import datetime, timedelta
from pathlib import Path

from selfplay.config import ServiceConfig
from selfplay.errors import GuardError, SelfplayError
from selfplay.processes.logs import bound_log, open_log
from selfplay.storage.ledger import LedgerError
from selfplay.storage.outside import explained
from selfplay.visible import visible

LONGEST_WAIT = 3600.0  # seconds between two tries of a round, unless retry_seconds is more


class Failures:
    """Failures in a row, and the wait before the next try."""

    def __init__(self) -> None:
        self.count = 0
        self._retry_at: datetime | None = None

    def forget(self) -> None:
        """Nothing fails any more, or a person said to try again."""
        self.count, self._retry_at = 0, None

    def give_up(self) -> None:
        """No further try comes by itself."""
        self._retry_at = None

    def add(self, error: Exception, settings: ServiceConfig, now: datetime) -> float | None:
        """Count a failure. Returns the seconds until the next try, or None where another try is in vain or one too many."""
        self.count += 1
        # A wrong setting or input stays wrong, and so does a reward that is another one.
        hopeless = getattr(error, "exit_code", 3) == 2 or isinstance(error.__cause__, GuardError)
        if hopeless or self.count > settings.retries:
            return None
        wait = settings.retry_seconds * 2.0 ** min(self.count - 1, 30)
        wait = max(settings.retry_seconds, min(wait, LONGEST_WAIT))
        self._retry_at = now + timedelta(seconds=wait)
        return wait

    def next_try(self, settings: ServiceConfig, now: datetime) -> datetime | None:
        """When the next try is due, where that is still to come. One that lies too far ahead is none: the clock was set back."""
        longest = timedelta(seconds=max(LONGEST_WAIT, settings.retry_seconds))
        return self._retry_at if self._retry_at is not None and now < self._retry_at <= now + longest else None


def in_words(error: Exception, run_dir: Path, now: datetime) -> str:
    """What an error is, for people, and what to do about it. The traceback of one that nobody expected goes to the log."""
    if isinstance(error, LedgerError):
        text = f"the ledger does not answer: {error.orig}"
    elif (known := error if isinstance(error, SelfplayError) else explained(error)) is not None:
        text = f"{known}; what to do: {known.hint}" if known.hint else str(known)
        if known is not error:
            write_traceback(error, run_dir, now)
    else:
        text = f"{type(error).__name__}: {error} (see {write_traceback(error, run_dir, now)})"
    return text.encode("utf-8", "backslashreplace").decode()  # terminal and ledger take no lone surrogate


def write_traceback(error: Exception, run_dir: Path, now: datetime) -> Path:
    """Append a traceback to the log of the service. Returns the path of the log."""
    log = run_dir / "logs" / "service.log"
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        bound_log(log)
        with open_log(log) as file:
            file.write(visible(f"{now.isoformat()} {''.join(traceback.format_exception(error))}\n").encode())
    return log
