"""Starts sandboxes, and ends them with all that is in them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reward import polling
from reward.scorer import ModelRefused

HERE = Path(__file__).parent
LAUNCH = (HERE / "launch.py").read_text(encoding="utf-8")
OPEN_FILES = 64


class SandboxFailed(Exception):
    """The sandbox could not be made. What would have run in it has shown nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    seconds: float
    """Of the wall clock, for the whole sandbox."""
    cpu_seconds: int
    """Of each process."""
    memory: int
    """Bytes of address space of each process."""
    processes: int
    """Processes and threads at a time."""
    files: int
    """Bytes in the scratch folder, and in any one file."""
    output: int
    """Bytes that are read of what a program prints."""


class Running:
    """A program in a sandbox."""

    def __init__(self, process: subprocess.Popen[bytes], until: float) -> None:
        self._process, self._until = process, until

    def output(self, most: int) -> tuple[bytes, bool]:
        """What it prints, and whether it ended by itself, in time, within `most` bytes and with exit code 0.

        Raises SandboxFailed.
        """
        assert self._process.stdout is not None
        found, is_whole = b"", True
        while True:
            left = self._until - time.monotonic()
            if left <= 0 or not polling.wait({self._process.stdout: polling.READ}, left):
                is_whole = False
                break
            part = os.read(self._process.stdout.fileno(), 65536)
            found += part
            if not part:
                break
            if len(found) > most:
                is_whole = False
                break
        if is_whole:  # it has closed its stdout, and may still do something
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, self._until - time.monotonic()))
            is_whole = self._process.returncode == 0
        self.end()
        return found[:most], is_whole

    def end(self) -> None:
        """End it. Raises SandboxFailed where it could not be made."""
        self.kill()
        assert self._process.stderr is not None
        if complaint := self._process.stderr.read(2000):
            raise SandboxFailed(complaint.decode(errors="replace").strip().splitlines()[-1])

    def kill(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


@contextlib.contextmanager
def running(
    program: str, arguments: Sequence[str], limits: Limits, *, stdin: int | None = None, fds: Sequence[int] = ()
) -> Iterator[Running]:
    """Run the source text `program` as Python's `-c`. It has `stdin`, stdout and the descriptors `fds`, under the same numbers.

    The standard library is there, and no other package. When the block ends, all of it has been killed. The thread that calls
    has to live as long as the block.
    """
    given = {
        "python": os.path.realpath(sys._base_executable),  # type: ignore[attr-defined]
        "prefix": sys.base_prefix,
        "parent": os.getpid(),
        "program": [program, *arguments],
        "fds": list(fds),
        "files": limits.files,
        "limits": {
            "RLIMIT_AS": limits.memory,
            "RLIMIT_CPU": limits.cpu_seconds,
            # A user who is not root has two processes of the sandbox itself in it.
            "RLIMIT_NPROC": limits.processes + (2 if os.geteuid() else 0),
            "RLIMIT_FSIZE": limits.files,
            "RLIMIT_NOFILE": OPEN_FILES,
            "RLIMIT_CORE": 0,
        },
    }
    process = subprocess.Popen(
        [given["python"], "-I", "-S", "-c", LAUNCH, json.dumps(given)],
        stdin=subprocess.DEVNULL if stdin is None else stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=fds,
        start_new_session=True,
        env={},
    )
    found = Running(process, time.monotonic() + limits.seconds)
    try:
        yield found
    finally:
        found.close()


def require() -> None:
    """Raise ModelRefused, which says why, where this machine has no sandbox."""
    few = Limits(seconds=60, cpu_seconds=20, memory=1 << 30, processes=4, files=1 << 20, output=100)
    try:
        with running("print('runs')", (), few) as program:
            said, is_whole = program.output(few.output)
    except (SandboxFailed, OSError) as error:
        raise ModelRefused(f"code needs a sandbox, and none can be had here: {error}") from error
    if not is_whole or said != b"runs\n":
        raise ModelRefused("code needs a sandbox, and the one that could be made runs no Python")
