"""A part as a process of its own, with a limit of its own. Nothing that it started outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

TAIL_BYTES, TAIL_LINES = 16 << 10, 25  # of a log that are kept where something failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a part ended."""

    state: Literal["done", "failed", "stopped"]  # stopped: it had used up its time
    seconds: float
    log_tail: str  # of all logs; empty where nothing went wrong


def run(
    argv: Sequence[str], limit: float, log: Path, on_line: Callable[[dict[str, Any]], None], env: Mapping[str, str]
) -> Ended:
    """Run a command for `limit` seconds at most; `on_line` gets each line of JSON that it prints.

    It runs below a guard (`selfplay.processes.guard`), which kills all that is left below it, whatever session or group that
    is in: when the command ends, when its time is over, and when this process is killed.
    """
    began, over = time.monotonic(), threading.Event()
    guarded = [sys.executable, "-m", "selfplay.processes.guard", str(os.getpid()), "--", *argv]
    with log.open("ab") as err:
        process = subprocess.Popen(
            guarded, stdout=subprocess.PIPE, stderr=err, stdin=subprocess.DEVNULL, env=dict(env), start_new_session=True,
            text=True,
        )  # fmt: skip

    def end() -> None:
        over.set()
        process.send_signal(signal.SIGUSR1)

    timer = threading.Timer(limit, end)
    timer.start()
    try:
        assert process.stdout is not None
        failed = False
        for line in process.stdout:
            found = json.loads(line)
            failed |= "error" in found
            on_line(found)
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            process.wait()
    state: Literal["done", "failed", "stopped"] = "stopped" if over.is_set() else "failed" if code or failed else "done"
    return Ended(
        state=state, seconds=time.monotonic() - began, log_tail="" if state == "done" else _tails(log, began)
    )  # fmt: skip


def _tails(log: Path, began: float) -> str:
    """The last lines of the part's log, and of those of the runs below its folder that it wrote to."""
    since = time.time() - (time.monotonic() - began)
    logs = [log, *(p for p in sorted(log.parent.rglob("*.log")) if p != log and p.stat().st_mtime >= since)]
    return "\n".join(f"== {p.relative_to(log.parent)}\n{_tail(p)}" for p in logs)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:])
