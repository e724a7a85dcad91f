"""The guard between the controller and a child: `python -m selfplay.processes.guard PARENT_PID -- argv…`.

The guard is a sub-reaper: the kernel makes it the parent of whatever its child leaves behind, and the guard kills all of
that before it exits. The guard ends when the controller ends, and its child ends with it. A process of ours further down,
such as a trainer behind a launcher, ends with its own parent, because `protocol.protocol()` asks the kernel for that.

Where the run folder is held by a lease, the guard watches that too, by its own clock. The controller may be stopped, and
another one may take the folder over: this child must not write there any more.

One case remains: somebody kills the guard from outside, and a process that is not ours lives below it. That process
carries the run folder in its environment, and `reaping.reap` ends it at the next start.

What the child and all below it write to stderr goes through the guard into the log, without characters that a terminal
would obey: a person reads the log with `less` or `tail`, and parts of it come from models and servers.

The temporary files of all of them are in a folder that the guard makes, and deletes when it ends (`scratch`).
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from selfplay.errors import DiskError
from selfplay.processes import scratch
from selfplay.processes.reaping import RUN_MARKER, descendants
from selfplay.visible import visible

GUARDED = "SELFPLAY_GUARDED"  # An environment variable that is set for processes that have to die with their parent.
LEASE = "SELFPLAY_LEASE"  # An environment variable: seconds, a colon, and the file of the controller's claim to the run folder.
NO_SCRATCH = 74  # The exit code of a guard that found no room for temporary files. The last line of its log says where.
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # From <linux/prctl.h>.
TERM_SECONDS = 5  # The time that a child has to end after SIGTERM before it is killed.
LAST_WORDS_SECONDS = 5  # The time in which the log takes what was written last. It is there once all are dead.

_log: threading.Thread | None = None  # Passes on what the child writes to stderr.
_scratch: Path | None = None


def guard(parent: int, argv: list[str]) -> int:
    """Run `argv`, pass SIGTERM on to it, and leave none of its descendants alive.

    Returns the exit code of the child, which is 128 + n after signal n, or NO_SCRATCH where it was not started. SIGUSR1 kills everything at once.
    """
    libc = ctypes.CDLL(None)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(_end_all(137)))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # The controller ended before the kernel was asked to tell us.
        return 137
    global _log, _scratch
    try:
        _scratch = scratch.make(Path(os.environ.get(RUN_MARKER, ".")))
    except DiskError as error:
        os.write(2, f"{error}; {error.hint}\n".encode())
        return NO_SCRATCH
    written, stderr = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(stderr, 2)
        os.environ.update(scratch.variables(_scratch))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"cannot run {argv[0]}: {error}", file=sys.stderr)
            os._exit(127)
    os.close(stderr)
    _log = threading.Thread(target=_pass_on, args=(written,), name="log", daemon=True)
    _log.start()
    if lease := os.environ.get(LEASE):
        seconds, _, path = lease.partition(":")
        threading.Thread(target=_watch, args=(path, float(seconds)), daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _terminate(child))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return _end_all(code if code >= 0 else 128 - code)


def _terminate(child: int) -> None:
    """Ask the child to end, and kill it if it still lives after TERM_SECONDS."""
    try:
        os.kill(child, signal.SIGTERM)
    except ProcessLookupError:
        return
    signal.signal(signal.SIGALRM, lambda *_: _kill(child))
    signal.alarm(TERM_SECONDS)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _pass_on(written: int) -> None:
    """Write to our stderr, which is the log, what the child writes to its own. A bar that is drawn anew gets a line each time."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    while piece := os.read(written, 1 << 16):
        text = visible(decoder.decode(piece).replace("\r\n", "\n").replace("\r", "\n"))
        with contextlib.suppress(OSError):  # On a full disk the log lacks some lines, and the child goes on.
            os.write(2, text.encode())


def _watch(claim: str, seconds: float) -> None:
    """Kill everything once the claim to the run folder is lost, or was not renewed for so long."""
    folder, name = os.path.split(claim)
    seen, since = b"", time.clock_gettime(time.CLOCK_BOOTTIME)
    while True:
        now = seen  # A file system that does not answer counts as one that stands still.
        try:
            if max((other for other in os.listdir(folder) if other.isdigit()), key=int, default="") != name:
                break
            with open(claim, "rb") as file:
                now = file.read()
        except FileNotFoundError:
            break
        except OSError:
            pass
        if now != seen:
            seen, since = now, time.clock_gettime(time.CLOCK_BOOTTIME)
        elif time.clock_gettime(time.CLOCK_BOOTTIME) - since > seconds:
            break
        time.sleep(min(1.0, seconds / 10))
    os.kill(os.getpid(), signal.SIGUSR1)


def _end_all(code: int) -> int:
    """Kill everything below this process, and reap it, until nothing is left; returns `code`.

    Nobody else may reap it: in a container the first process is often the controller itself.
    """
    signal.alarm(0)  # what it would kill may be gone, and its number another one's
    while True:
        living = descendants(os.getpid())
        for pid in living:
            _kill(pid)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # Whatever lives below is below a child, so nothing does.
            break
        if not living:
            break
        time.sleep(0.01)
    if _log is not None:
        _log.join(LAST_WORDS_SECONDS)
    if _scratch is not None:
        scratch.remove(_scratch)
    return code


if __name__ == "__main__":
    separator = sys.argv.index("--")
    # The standard streams belong to the child, so the guard neither reads nor closes nor flushes them.
    os._exit(guard(int(sys.argv[1]), sys.argv[separator + 1 :]))
