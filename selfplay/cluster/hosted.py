"""The controller's side of a child on another node. It has the pipes, the signals and the exit code of a process of this machine.

A thread asks the host for output and writes it to a pipe of this machine, and another one carries orders the other way. So the
controller waits for a child with deadlines wherever the child runs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from selfplay.cluster.host import CHUNK
from selfplay.processes import children
from selfplay.processes.guard import LEASE
from selfplay.processes.logs import open_log
from selfplay.processes.pipe import LONGEST_LINE
from selfplay.processes.places import ADDRESS, NODE, PORT
from selfplay.visible import visible

ASK = 10.0  # Seconds that a question for output waits on the node.
GREET = 20.0  # Seconds between two words to a host that is asked for nothing, because nobody reads what came last.
LAST = 10.0  # Seconds that the other nodes of a trainer have to end when the first one has ended.
KILLED = 137
HANDED_ON = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "NCCL_", "GLOO_", "VLLM_", LEASE)
"""Beginnings of the environment variables that a child on a node gets from the controller, beside its own."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""What has one of these behind the beginning of its name stays here: whoever reaches the ports of Ray could read it."""


class HostLost(Exception):
    """A host cannot be reached any more, or never could."""


class NeverUp(HostLost):
    """A host was lost before it was up: with its node, whose end Ray had not noticed when it put the host there."""


class Remote(Protocol):
    """A host on a node. Its methods are those of `host.Host`, and raise HostLost where it is gone."""

    def call(self, method: str, *args: Any) -> Any: ...

    def kill(self) -> None:
        """End it with its child, at once. It may be called at any time."""


class Seats(Protocol):
    """Where the hosts of one child are put."""

    def take(self, given_up: threading.Event) -> list[Remote]:
        """Wait until there is room, and start the hosts, one on each node. Raises HostLost."""


class Hosted:
    """A child on one node, or a launcher on each of several nodes whose first one takes the orders."""

    def __init__(self, seats: Seats, argv: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.pid, self.lost = 0, ""
        self._argv, self._log = list(argv), log
        self._variables = {**handed_on(), **variables}
        own = self._variables.pop(children.OWN, "").split(",")
        self._without = sorted(children.withheld().difference(own))  # names alone: their values are the node's own
        ours, self._orders = socket.socketpair()
        self.stdin: IO[bytes] | None = os.fdopen(ours.detach(), "wb", 0)
        read, self._output = os.pipe()
        self.stdout: IO[bytes] | None = os.fdopen(read, "rb", 0)
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._given_up, self._ended = threading.Event(), threading.Event()
        self._code: int | None = None
        self._hosts: list[Remote] = []
        self._whole_lines = threading.Lock()
        for work in (lambda: self._live(seats), self._pass_signals):
            threading.Thread(target=work, name=f"{log.stem}-node", daemon=True).start()

    # as a process of this machine

    def poll(self) -> int | None:
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self._argv, timeout or 0.0)
        assert self._code is not None
        return self._code

    def send_signal(self, signal: int, /) -> None:
        self._signals.put(signal)  # which a signal handler may do too

    def end(self) -> None:
        self._given_up.set()
        for host in self._hosts:
            host.kill()

    def close(self) -> None:
        for stream in (self.stdin, self.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    # its threads

    def _live(self, seats: Seats) -> None:
        """From the wait for room to the exit code."""
        code = KILLED
        try:
            self._hosts = seats.take(self._given_up)
            if self._given_up.is_set():  # it was stopped just now
                raise HostLost("was not wanted any more")
            self._start()
            code = self._follow_first()
        except HostLost as lost:
            if not self._given_up.is_set():
                self._say(str(lost))
        except Exception as error:  # a bug must not leave the controller waiting
            self._say(f"could not be followed: {type(error).__name__}: {error}")
        finally:
            for host in self._hosts:
                host.kill()
            self._code = code
            self._ended.set()
            self._signals.put(None)
            with contextlib.suppress(OSError):
                self._orders.shutdown(socket.SHUT_RDWR)
            with self._whole_lines:
                os.close(self._output)

    def _start(self) -> None:
        first, folder = self._hosts[0], os.getcwd()
        address, port = first.call("rendezvous") if len(self._hosts) > 1 else ("", 0)
        for number, host in enumerate(self._hosts):
            told = {NODE: number, PORT: port, **({ADDRESS: address} if address else {})}
            argv = [_filled(word, told) for word in self._argv]
            log = self._log if not number else self._log.with_stem(f"{self._log.stem}-{number + 1}")
            try:
                pid = host.call("start", argv, self._variables, str(log.resolve()), folder, self._without)
            except OSError as error:
                raise HostLost(f"cannot start on its node, which needs {folder} and the run folder: {error}") from error
            self.pid = self.pid or pid
        threading.Thread(target=self._carry_orders, args=(first,), name="orders", daemon=True).start()
        for host in self._hosts[1:]:
            threading.Thread(target=self._follow_other, args=(host,), name="node", daemon=True).start()

    def _follow_first(self) -> int:
        first, others = self._hosts[0], self._hosts[1:]
        while (data := first.call("read", ASK)) is not None:
            self._put_out(data)
        while (code := first.call("exit_code", ASK)) is None:
            continue
        for host in others:
            host.call("exit_code", LAST)
        assert isinstance(code, int)
        return code

    def _follow_other(self, host: Remote) -> None:
        """Hand on whole lines of a further node, for its errors are answers too. Where it ends too early, all end."""
        rest = b""
        try:
            while (data := host.call("read", ASK)) is not None:
                lines, newline, rest = (rest + data).rpartition(b"\n")
                if len(rest) > LONGEST_LINE:
                    raise HostLost(f"wrote a line of more than {LONGEST_LINE} bytes on one of its nodes")
                self._put_out(lines + newline)
            while (code := host.call("exit_code", ASK)) is None:
                continue
            if code and not self._ended.wait(LAST):
                self._say(f"ended with exit code {code} on one of its nodes")
                self.end()
        except HostLost as lost:
            if not (self._ended.is_set() or self._given_up.is_set()):
                self._say(str(lost))
                self.end()

    def _put_out(self, data: bytes) -> None:
        with self._whole_lines:
            if not self._ended.is_set():
                left = memoryview(data)
                while left:
                    try:
                        left = left[os.write(self._output, left) :]
                    except BrokenPipeError:  # the controller does not listen any more
                        return

    def _carry_orders(self, host: Remote) -> None:
        with contextlib.suppress(HostLost, OSError):
            while data := self._orders.recv(CHUNK):
                if not host.call("write", data):
                    break
            else:
                host.call("close_input")
        with contextlib.suppress(OSError):
            self._orders.shutdown(socket.SHUT_RDWR)

    def _pass_signals(self) -> None:
        while (number := self._next_signal()) is not None:
            self._given_up.set()
            for host in self._hosts:
                try:
                    host.call("send_signal", number)
                except HostLost:
                    continue
                except Exception:  # no child was started there yet
                    host.kill()
            if number == signal.SIGUSR1:
                self.end()

    def _next_signal(self) -> int | None:
        """The next one, or None when it has ended. Meanwhile the hosts hear that the controller is there."""
        while True:
            try:
                return self._signals.get(timeout=GREET)
            except queue.Empty:
                for host in self._hosts:
                    with contextlib.suppress(HostLost):
                        host.call("hear")

    def _say(self, lost: str) -> None:
        """Remember why it ended, and write it to its log."""
        self.lost = self.lost or lost
        with contextlib.suppress(OSError):
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open_log(self._log) as log:
                log.write(visible(f"it {self.lost}\n").encode())


def handed_on() -> dict[str, str]:
    """The controller's environment variables that a child on a node gets."""
    found = {}
    for name, value in children.inherited_environment().items():
        beginning = next((each for each in HANDED_ON if name.startswith(each)), None)
        if beginning is not None and not any(part in name.removeprefix(beginning) for part in SECRET):
            found[name] = value
    return found


def _filled(word: str, told: Mapping[str, object]) -> str:
    for name, value in told.items():
        word = word.replace(name, str(value))
    return word
