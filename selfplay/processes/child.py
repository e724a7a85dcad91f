"""The controller's side of one child: it is started under a guard, takes orders, and is ended with all that is below it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reward import polling
from selfplay.errors import Interrupted
from selfplay.processes import children
from selfplay.processes.guard import GUARDED, NO_SCRATCH
from selfplay.processes.logs import last_line, open_log
from selfplay.processes.pipe import LONGEST_LINE, Pipe
from selfplay.processes.places import HERE, Place, Process
from selfplay.processes.protocol import Event, encode_line, parse_line
from selfplay.processes.reaping import RUN_MARKER
from selfplay.visible import visible

PATIENT = 86_400.0  # The bound on silence, in seconds, for a child that may be fetching a model.


class ChildError(RuntimeError):
    """An order failed inside a child, and the child lives on. `kind` is the child's own word for what happened."""

    def __init__(self, name: str, kind: str, message: str, hint: str, log: Path) -> None:
        super().__init__(message)
        self.name, self.kind, self.hint, self.log = name, kind, hint, log


class ChildDied(RuntimeError):
    """A child ended while something was expected of it. It may also have been ended because it was silent for too long."""

    def __init__(self, name: str, why: str, log: Path) -> None:
        super().__init__(f"the {name} process {why}")
        self.name, self.log = name, log


class Child:
    """One supervised process. It takes orders as JSON lines on stdin and answers on stdout; all else goes to its log.

    `silence` (seconds) is the longest time in which it may neither take an order nor write anything while the controller
    waits for one of the two. After that the child counts as hung and is ended. `place` is where it is started.
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
        place: Place = HERE,
    ) -> None:
        self.name, self.log, self.silence, self._place = name, log, silence, place
        self._argv = list(argv)
        self._variables = {**(env or {}), RUN_MARKER: str(run_dir.resolve()), GUARDED: "1"}
        self._process: Process | None = None
        self._pipe: Pipe | None = None
        self._next_id = 0
        self._moved = 0.0  # The time.monotonic() at which an order was sent last, or an event was heard.

    def start(self) -> None:
        """Start the guard and the child, and return at once. `wait_for("ready")` tells when the child can take orders.

        Raises Interrupted after `children.cut`.
        """
        assert self._process is None, f"{self.name} was started already"
        children.check_may_start()
        self._process = self._place.start(self._argv, self._variables, self.log)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._pipe = Pipe(self._process.stdout, self._process.stdin)
        children.add(self)
        try:
            children.check_may_start()
        except Interrupted:  # The cut came after the first check, and it may not have seen this child.
            self.stop(grace=0)
            raise

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of the guard, which is also the id of the process group."""
        assert self._process is not None
        return self._process.pid

    def order(self, order: str, on_event: Callable[[Event], None] | None = None, **fields: Any) -> Any:
        """Send one order and wait for its result. Raises ChildError or ChildDied."""
        return self.result(self.send(order, **fields), on_event)

    def send(self, order: str, **fields: Any) -> int:
        """Send one order and return its number. `result` with this number waits for the answer. Raises ChildDied."""
        assert self._pipe is not None, f"{self.name} was not started"
        self._next_id += 1
        line = encode_line({"id": self._next_id, "order": order, **fields})
        try:
            self._pipe.write(line, self.silence)
        except TimeoutError as error:
            raise self._hung() from error
        except OSError as error:
            raise self._died() from error
        self._moved = time.monotonic()
        return self._next_id

    def result(self, order_id: int, on_event: Callable[[Event], None] | None = None) -> Any:
        """Wait for the result of an order. `on_event` gets its other events. Raises ChildError or ChildDied."""
        for event in self._events():
            if event.get("id") != order_id:
                continue
            if "result" in event:
                return event["result"]
            if "error" in event:
                raise self.failure(event)
            if on_event is not None:
                on_event(event)
        raise self._died()

    def hear(self) -> None:
        """Take in what the child has said so far, so that it need not wait for somebody who asks for it later."""
        if self._pipe is not None:
            self._pipe.take_in()

    def failure(self, event: Event) -> ChildError:
        """The error that an event tells of, to be raised."""
        error = event["error"]
        return ChildError(self.name, error["kind"], error["message"], error.get("hint", ""), self.log)

    def heard(self) -> list[Event]:
        """All events that have come, without waiting for more. For orders that are in flight together: their events have their
        numbers. Raises ChildDied where the child has ended, and where it was silent for too long."""
        assert self._pipe is not None, f"{self.name} was not started"
        lines, open_still = self._pipe.lines_so_far()
        if lines:
            self._moved = time.monotonic()
        elif not open_still:
            raise self._died()
        elif time.monotonic() - self._moved > self.silence:
            raise self._hung()
        return [event for line in lines if (event := self._parse(line)) is not None]

    def wait_for(self, event_name: str) -> Event:
        """Wait for an event that no order asked for, such as «ready». Raises ChildDied."""
        for event in self._events():
            if event.get("event") == event_name or event.get(event_name) is True:
                return event
        raise self._died()

    def wait(self) -> int:
        """Wait until a child that takes no orders ends; returns its exit code, which is 128 + n after signal n."""
        assert self._process is not None, f"{self.name} was not started"
        for _ in self._events():
            continue
        code = self._process.wait()
        self.stop(grace=0)
        return code

    def stop(self, grace: float = 5.0) -> None:
        """End the child and everything below it, by force after `grace` seconds. It may be called at any time, and twice."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if grace > 0 else signal.SIGUSR1)
            try:
                process.wait(grace + 5)
            except subprocess.TimeoutExpired:
                process.end()
                process.wait()
        process.close()
        children.discard(self)
        self._process = self._pipe = None

    def cut(self) -> None:
        """End the child and everything below it at once. Any thread may call it; whoever waits for the child finds it dead."""
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)

    def _events(self) -> Iterator[Event]:
        """The events of the child as they come, until it closes its output. Raises ChildDied where it hangs."""
        while True:
            assert self._pipe is not None, f"{self.name} was not started"
            try:
                line = self._pipe.read_line(self.silence)
            except TimeoutError as error:
                raise self._hung() from error
            if line is None:
                if self._pipe.overlong:
                    raise self._died()
                return
            event = self._parse(line)
            del line  # It may be as large as the event, which is all that is needed from here on.
            if event is not None:
                yield event

    def _parse(self, line: bytes) -> Event | None:
        event = parse_line(line)
        if event is None:  # A launcher prints to the same pipe.
            with open_log(self.log) as log:
                log.write(visible(line.decode("utf-8", "backslashreplace")).encode() + b"\n")
        return event

    def _hung(self) -> ChildDied:
        """End a child that was silent for too long; returns the error to raise."""
        self.stop(grace=0)
        return ChildDied(self.name, f"said nothing for {self.silence:.0f} s and was ended", self.log)

    def _died(self) -> ChildDied:
        """Clean up after a child that has ended or closed its output; returns the error to raise, which tells how."""
        if self._pipe is not None and self._pipe.overlong:
            self.stop(grace=0)
            return ChildDied(self.name, f"wrote a line of more than {LONGEST_LINE} bytes and was ended", self.log)
        code, lost = None, ""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(10)
            lost = self._process.lost
        how = lost or ("closed its output" if code is None else f"ended with exit code {code}")
        signals = {128 + s: s.name for s in signal.Signals}
        if code in signals and not lost:
            how = f"was killed by {signals[code]}"
        elif code == NO_SCRATCH and not lost:
            how = f"was not started: {last_line(self.log)}"
        self.stop(grace=0)
        return ChildDied(self.name, how, self.log)


def wait_for_any(running: Sequence[Child], seconds: float) -> None:
    """Wait until one of several children says something or ends, or until the time is over. `Child.heard` tells what it was."""
    pipes = [child._pipe for child in running if child._pipe is not None]
    if not any(pipe.has_lines for pipe in pipes):
        polling.wait({pipe.source: polling.READ for pipe in pipes}, seconds)
