"""A Python process that answers questions, and is killed when an answer takes too long.

Some libraries bound their time with signals, which work in the main thread of a process alone, and some computations (a power
of huge numbers) hear no signal at all. A process of its own can always be ended.

Questions and answers are lines of JSON on stdin and stdout. The process says `{"ready": true}` first. It ends with its stdin,
and with the process that started it.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from reward import polling

PR_SET_PDEATHSIG = 1
STARTS = 60.0  # seconds that the imports of a process may take
MOST = 1 << 20  # bytes of an answer
HANDED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "SELFPLAY_RUN")
"""Variables that the process gets. It reads texts that nobody has read, so it gets no other, such as the key of a judge. By the
last one a supervisor finds what was left behind."""


class TooSlow(Exception):
    """No answer came in time."""


class Ended(Exception):
    """The process ended instead of giving an answer."""


class Worker:
    """Runs `python -m module`. One thread at a time asks, and it has to live as long as this process."""

    def __init__(self, module: str, seconds: float) -> None:
        """`seconds`: the most that an answer may take."""
        self._argv, self._seconds = [sys.executable, "-m", module], seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process. It returns at once."""
        path = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={n: os.environ[n] for n in HANDED_ON if n in os.environ} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self._is_ready = False

    def ask(self, question: Any) -> Any:
        """Raises TooSlow and Ended. The next question then starts another process."""
        if self._process is None:
            self.start()
        process = self._process
        assert process is not None and process.stdin is not None
        try:
            if not self._is_ready:
                self._line(process, STARTS)
                self._is_ready = True
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            return json.loads(self._line(process, self._seconds))
        except BrokenPipeError:
            self.stop()
            raise Ended("the process had ended") from None
        except (TooSlow, Ended):
            self.stop()
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what was written to it will not be read
                    pipe.close()
            self._process.wait()
            self._process = None

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        until, found = time.monotonic() + seconds, b""
        while not found.endswith(b"\n"):
            left = until - time.monotonic()
            if left <= 0 or not polling.wait({process.stdout: polling.READ}, left):
                raise TooSlow(f"no answer within {seconds:g} s")
            part = os.read(process.stdout.fileno(), 65536)
            if not part or len(found) > MOST:
                raise Ended("the process ended without an answer")
            found += part
        return found


def serve(answer: Callable[[Any], Any], memory: int) -> None:
    """Answer the questions on stdin until it ends. For the process; `memory`: bytes that it may have.

    What is printed meanwhile goes to stderr.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    print('{"ready": true}', file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=out, flush=True)
