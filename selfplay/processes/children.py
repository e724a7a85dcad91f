"""Supervised child processes: guarded, logged, spoken to in JSON lines, and never left behind.

Every child runs under a small guard process (`python -m selfplay.processes.children PARENT_PID -- argv…`), so the tree is

    controller ─ guard ─ child ─ (launcher's trainer, engine cores, …)

The guard is a sub-reaper: whatever its child leaves behind is re-parented to it, and it kills all of that before it exits.
It dies with the controller, its child dies with it, and a process of ours further down (a trainer behind a launcher) dies
with its own parent, because `protocol()` asks for that first. What survives even so (the guard and a foreign grandchild
killed from outside in the same instant) carries the run folder in its environment, and `reap` ends it at the next start.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO

from selfplay.errors import Interrupted

RUN_MARKER = "SELFPLAY_RUN"  # environment variable of every child: the run folder it works for
GUARDED = "SELFPLAY_GUARDED"  # set for children that have to die with their parent
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

PATIENT = 86_400.0  # seconds of silence for a child that may be fetching a model

LARGEST_LOG = 16 << 20  # bytes; a longer log begins anew, and its end stays as `<name>.1`
LOG_SECONDS = 1.0  # between two looks at the log of a child that runs

Event = dict[str, Any]


class ChildError(RuntimeError):
    """An order failed inside a child, which lives on. `kind` is the child's own word for what happened."""

    def __init__(self, name: str, kind: str, message: str, hint: str, log: Path) -> None:
        super().__init__(message)
        self.name, self.kind, self.hint, self.log = name, kind, hint, log


class ChildDied(RuntimeError):
    """A child ended, or said nothing for too long and was ended, while something was expected of it."""

    def __init__(self, name: str, why: str, log: Path) -> None:
        super().__init__(f"the {name} process {why}")
        self.name, self.log = name, log


# --- in the controller -------------------------------------------------------------------------------------------------

# PR_SET_PDEATHSIG fires when the spawning THREAD ends; this one lives as long as the process.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spawner")
_running: set[Child] = set()
_ending = threading.Event()  # no child is to start any more
_withheld: set[str] = set()
_heard = 0.0  # by time.monotonic(), when a child last wrote to its output


def withhold(*variables: str) -> None:
    """Keep environment variables, those with secrets that are not theirs, from all children that start later."""
    _withheld.update(variables)


def heard() -> float:
    """When any child last wrote to its output, by time.monotonic()."""
    return _heard


def bound_log(log: Path) -> None:
    """Have a log that grew too long begin anew, and keep its end. What appends to it goes on: it is cut, not renamed."""
    with contextlib.suppress(OSError):  # it is not there yet
        size = log.stat().st_size
        if size <= LARGEST_LOG:
            return
        try:
            with log.open("rb") as source, log.with_name(f"{log.name}.1").open("wb") as kept:
                os.sendfile(kept.fileno(), source.fileno(), size - LARGEST_LOG, LARGEST_LOG)
        finally:  # on a full disk its end is lost, and it makes room all the same
            os.truncate(log, 0)


class Child:
    """One supervised process that takes orders as JSON lines on stdin and answers on stdout; the rest goes to its log.

    `silence` (seconds) bounds the time in which it neither takes an order nor says a word while one of them is awaited; past
    it the child is taken for hung.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        run_dir: Path,
        log: Path,
        env: Mapping[str, str] | None = None,
        silence: float = 900.0,
    ) -> None:
        self.name, self.log, self.silence = name, log, silence
        self._argv = [sys.executable, "-m", "selfplay.processes.children", str(os.getpid()), "--", *argv]
        inherited = {name: value for name, value in os.environ.items() if name not in _withheld}
        self._env = {**inherited, **(env or {}), RUN_MARKER: str(run_dir.resolve()), GUARDED: "1"}
        # Without bytecode files the imports of a child take two to three times as long, at every start.
        self._env.pop("PYTHONDONTWRITEBYTECODE", None)
        # Children are found by module name from wherever the service was started.
        self._env["PYTHONPATH"] = os.pathsep.join(
            p for p in (str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")) if p
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._next_id = 0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start the guard and the child; returns at once. `wait_for("ready")` tells when the child can take orders.

        Raises Interrupted after `cut`.
        """
        assert self._process is None, f"{self.name} was started already"
        if _ending.is_set():
            raise Interrupted("everything is to end")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        bound_log(self.log)
        with self.log.open("ab") as log:
            self._process = _spawner.submit(
                subprocess.Popen,
                self._argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._env,
                start_new_session=True,
            ).result()
        assert self._process.stdin is not None and self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        _running.add(self)
        self._stopped.clear()
        threading.Thread(target=self._bound_log, name=f"{self.name}-log", daemon=True).start()
        if _ending.is_set():  # the cut came in between
            self.stop(grace=0)
            raise Interrupted("everything is to end")

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The guard's process id, which is also the process group."""
        assert self._process is not None
        return self._process.pid

    def order(self, order: str, on_event: Callable[[Event], None] | None = None, **fields: Any) -> Any:
        """Send one order and wait for its result. Raises ChildError or ChildDied."""
        return self.result(self.send(order, **fields), on_event)

    def send(self, order: str, **fields: Any) -> int:
        """Send one order; `result` with the returned number waits for what came of it."""
        self._next_id += 1
        self._write(json.dumps({"id": self._next_id, "order": order, **fields}, allow_nan=False).encode() + b"\n")
        return self._next_id

    def result(self, order_id: int, on_event: Callable[[Event], None] | None = None) -> Any:
        for event in self._events():
            if event.get("id") != order_id:
                continue
            if "result" in event:
                return event["result"]
            if "error" in event:
                error = event["error"]
                raise ChildError(self.name, error["kind"], error["message"], error.get("hint", ""), self.log)
            if on_event is not None:
                on_event(event)
        raise self._died()

    def wait_for(self, event_name: str) -> Event:
        """Wait for an event that no order asked for, such as «ready»."""
        for event in self._events():
            if event.get("event") == event_name or event.get(event_name) is True:
                return event
        raise self._died()

    def wait(self) -> int:
        """Wait for a child that takes no orders to end; returns its exit code, 128 + n for signal n."""
        assert self._process is not None, f"{self.name} was not started"
        for _ in self._events():
            continue
        code = self._process.wait()
        self.stop(grace=0)
        return code

    def stop(self, grace: float = 5.0) -> None:
        """End the child and everything below it; after `grace` seconds by force. Safe to call at any time, twice too."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if grace > 0 else signal.SIGUSR1)
            try:
                process.wait(grace + 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        self._stopped.set()
        _running.discard(self)
        self._process = None

    def cut(self) -> None:
        """End the child and everything below it at once, from any thread; whoever waits for it finds it dead."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)

    def _events(self) -> Iterator[Event]:
        """Protocol lines as they come; ends when the child closes its output."""
        assert self._process is not None and self._process.stdout is not None, f"{self.name} was not started"
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                event = _parse(line)
                if event is None:  # a launcher's own print
                    with self.log.open("ab") as log:
                        log.write(line + b"\n")
                else:
                    yield event
            self._ready(self._process.stdout)
            if not self._read():
                return

    def _write(self, line: bytes) -> None:
        """Write an order, and read meanwhile: a child that still tells of an earlier one takes none before it is heard."""
        process, left = self._process, memoryview(line)
        assert process is not None and process.stdin is not None, f"{self.name} was not started"
        assert process.stdout is not None
        while left:
            ready = self._ready(process.stdout, process.stdin)
            if process.stdout in ready and not self._read():
                raise self._died()
            if process.stdin in ready:
                try:
                    left = left[os.write(process.stdin.fileno(), left) :]
                except OSError as error:
                    raise self._died() from error

    def _ready(self, out: IO[bytes], into: IO[bytes] | None = None) -> list[IO[bytes]]:
        """Those that can be read and written now. Raises ChildDied once neither could for `silence` seconds."""
        readable, writable, _ = select.select([out], [into] if into else [], [], self.silence)
        if not (readable or writable):
            self.stop(grace=0)
            raise ChildDied(self.name, f"said nothing for {self.silence:.0f} s and was ended", self.log)
        return readable + writable

    def _read(self) -> bool:
        """Read what the child has written; False where it has closed its output."""
        global _heard
        assert self._process is not None and self._process.stdout is not None
        try:
            # Not through the file object: what that had read ahead `select` would not see.
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return True
        _heard = time.monotonic()
        self._buffer += chunk
        return bool(chunk)

    def _bound_log(self) -> None:
        while not self._stopped.wait(LOG_SECONDS):
            bound_log(self.log)

    def _died(self) -> ChildDied:
        code = None
        if self._process is not None:
            try:
                code = self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.stop(grace=0)
        how = "closed its output" if code is None else f"ended with exit code {code}"
        signals = {128 + s: s.name for s in signal.Signals}
        if code in signals:
            how = f"was killed by {signals[code]}"
        self.stop(grace=0)
        return ChildDied(self.name, how, self.log)


def _parse(line: bytes) -> Event | None:
    if not line.startswith(b"{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


@atexit.register
def stop_all() -> None:
    """End every child of this process."""
    for child in list(_running):
        child.stop(grace=0)


def cut() -> None:
    """End every child and start none until `uncut`; from any thread or signal handler.

    The thread that waits for a child finds it dead, and closes what belongs to it: closed here, its pipes would be gone
    under that thread.
    """
    _ending.set()
    end_running()


def end_running() -> None:
    """End every child at once, from any thread, as `cut` does; others may start."""
    for child in list(_running):
        child.cut()


def uncut() -> None:
    _ending.clear()


def marked(run_dir: Path) -> list[int]:
    """Process ids of all living processes that were started for `run_dir`, by any controller."""
    marker = f"{RUN_MARKER}={run_dir.resolve()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # gone meanwhile, or another user's
        if marker in environment and state != "Z":
            found.append(int(entry.name))
    return found


def reap(run_dir: Path) -> int:
    """Kill what an earlier controller of `run_dir` left behind; returns how many. Call it with the run folder locked."""
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
    return len(killed)


# --- in a child ---------------------------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends. A no-op in a process that no guard started."""
    if GUARDED not in os.environ:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the parent process ended before this one began")


class Channel:
    """The child's end: orders come in, events and results go out."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source, self._sink, self._lock = source, sink, threading.Lock()

    def orders(self) -> Iterator[Event]:
        """Orders until the controller closes the pipe or sends «exit»."""
        for line in self._source:
            order = json.loads(line)
            if order["order"] == "exit":
                return
            yield order

    def send(self, event: Event) -> None:
        with self._lock:
            self._sink.write(json.dumps(event, allow_nan=False).encode() + b"\n")
            self._sink.flush()

    def ready(self, **fields: Any) -> None:
        self.send({"event": "ready", **fields})

    def progress(self, order: Event, **fields: Any) -> None:
        self.send({"id": order["id"], "event": "progress", **fields})

    def result(self, order: Event, result: Any) -> None:
        self.send({"id": order["id"], "result": result})

    def error(self, order: Event, kind: str, message: str, hint: str = "") -> None:
        self.send({"id": order["id"], "error": {"kind": kind, "message": message, "hint": hint}})


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import transformers without scikit-learn, pandas and scipy: it takes them for seconds, for assisted decoding and the
    losses of object detection only. And without a search for garbage: imports make none, and it takes a sixth of their time.
    """
    blocked = {"sklearn", "scipy"} - sys.modules.keys()
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for name in blocked:
            del sys.modules[name]


def protocol() -> Channel:
    """First call of a child, before heavy imports: dies with its parent, and keeps stdin and stdout for the protocol.

    File descriptor 1 is the log from here on, so nothing that a library prints can break a line.
    """
    die_with_parent()
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    return Channel(source, sink)


# --- the guard ----------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`, whatever their process group or session."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def guard(parent: int, argv: list[str]) -> int:
    """Run `argv`, pass SIGTERM on, and leave no descendant alive; returns the exit code, 128 + n for signal n."""
    libc = ctypes.CDLL(None)
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(_end_all(137)))
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:
        return 137
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            print(f"cannot run {argv[0]}: {error}", file=sys.stderr)
            os._exit(127)
    signal.signal(signal.SIGTERM, lambda *_: _terminate(child))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return _end_all(code if code >= 0 else 128 - code)


def _terminate(child: int) -> None:
    """A polite end within five seconds, then by force."""
    try:
        os.kill(child, signal.SIGTERM)
    except ProcessLookupError:
        return
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(5)


def _end_all(code: int) -> int:
    while left := descendants(os.getpid()):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
    return code


if __name__ == "__main__":
    separator = sys.argv.index("--")
    # The guard closes nothing and reads nothing: pipes belong to its child.
    os._exit(guard(int(sys.argv[1]), sys.argv[separator + 1 :]))
