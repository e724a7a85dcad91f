"""The side of the node: it starts one child under the guard, and hands on bytes, signals and the exit code.

The guard ends the child when this process ends, whatever ended it. A host whose controller is not heard any more ends its child
by itself: to the controller the node is then lost, and another child may be at work in its place.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from reward import polling
from selfplay.processes.gpus import ORDER
from selfplay.processes.places import HERE, Local

LEASE = 120.0  # Seconds without a word of the controller.
AGAIN = ("/bin/sh", "-c", f'exec {shlex.quote(sys.executable)} -m selfplay.processes.guard "$PPID" -- "$@"', "guard")
"""A guard below the guard. A worker of Ray that ends kills its own children, and so the first guard, which cannot end what is below
it then. The second one sees its end."""
CHUNK = 1 << 20  # The most bytes that are handed on at a time.


class Host:
    """One child of a run. Several threads call it: one reads, one writes, one sends signals."""

    def __init__(self, gpus: Sequence[object], address: str, cluster: str = "") -> None:
        """`gpus`: the names of those that this process was given; `address`: of this node; `cluster`: the address of Ray's, for
        an engine whose workers lie on several nodes. It takes an empty list of visible GPUs for none said."""
        self._visible = {**ORDER, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        self._visible |= {"RAY_ADDRESS": cluster} if cluster else {}
        self._address = address
        self._child: Local | None = None
        self._heard = time.monotonic()

    def rendezvous(self) -> tuple[str, int]:
        """The address of this node, and a port that is free there."""
        with socket.socket() as free:
            free.bind(("", 0))
            return self._address, int(free.getsockname()[1])

    def start(
        self, argv: Sequence[str], variables: Mapping[str, str], log: str, folder: str, without: Sequence[str] = ()
    ) -> int:
        """Start a child in `folder`; returns the process id of its guard. Raises FileNotFoundError where that is not there.

        It gets the environment of this node but the variables `without`.
        """
        assert self._child is None, "a host has one child"
        os.chdir(folder)
        self._child = HERE.start([*AGAIN, *argv], {**variables, **self._visible}, Path(log), self._address, without)
        self.hear()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()
        return self._child.pid

    def read(self, seconds: float) -> bytes | None:
        """What the child writes next, empty where it is silent for so long; None where it has closed its output."""
        self.hear()
        source = self._running.stdout
        assert source is not None
        if not polling.wait({source: polling.READ}, seconds):
            return b""
        return os.read(source.fileno(), CHUNK) or None

    def write(self, data: bytes) -> bool:
        """Write to the child's input, once it takes it; False where it does not any more."""
        sink = self._running.stdin
        assert sink is not None
        try:
            sink.write(data)
            sink.flush()
        except (OSError, ValueError):
            return False
        return True

    def close_input(self) -> None:
        """Let the child see the end of its orders."""
        sink = self._running.stdin
        assert sink is not None
        sink.close()

    def exit_code(self, seconds: float) -> int | None:
        """The exit code of the guard; None where it still runs after so long."""
        self.hear()
        try:
            return self._running.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def hear(self) -> None:
        """The controller is there."""
        self._heard = time.monotonic()

    def send_signal(self, number: int) -> None:
        """Send a signal to the guard."""
        self._running.send_signal(number)

    @property
    def _running(self) -> Local:
        assert self._child is not None, "no child was started"
        return self._child

    def _watch(self) -> None:
        while self._running.poll() is None:
            if time.monotonic() - self._heard > LEASE:
                self._running.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
