"""Finding processes: those below a process, and those that an earlier controller of a run left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from selfplay.processes import scratch

RUN_MARKER = "SELFPLAY_RUN"  # An environment variable of every child. Its value is the run folder that it works for.


def descendants(pid: int) -> list[int]:
    """Process ids of all living processes below `pid`, whatever their process group or session is."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, parent = _state_and_parent(entry)
        except OSError:
            continue  # The process has ended meanwhile.
        if state != "Z":
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def marked(run_dir: Path) -> list[int]:
    """Process ids of all living processes that any controller started for `run_dir`."""
    marker = f"{RUN_MARKER}={run_dir.resolve()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            state, _ = _state_and_parent(entry)
        except OSError:
            continue  # The process has ended meanwhile, or it belongs to another user.
        if marker in environment and state != "Z":
            found.append(int(entry.name))
    return found


def reap(run_dir: Path) -> int:
    """Kill what an earlier controller of `run_dir` left behind, and return how many processes that were. Their temporary
    files go too.

    The caller holds the lock of the run folder: otherwise the children of a living controller would be killed.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + 10
    while (left := marked(run_dir)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    scratch.sweep(run_dir)
    return len(killed)


def _state_and_parent(process: Path) -> tuple[str, int]:
    """The state letter («Z» is a zombie, all of it) and the parent's process id, from a folder of /proc."""
    # The name of the program stands before them in parentheses, and it may itself contain spaces and parentheses.
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    # Where the first thread has ended and others go on, the letter is that of the first, and nobody can reap it yet.
    threads = int(fields[17])
    return "R" if fields[0] == "Z" and threads > 1 else fields[0], int(fields[1])
