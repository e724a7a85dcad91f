"""Who works in a run folder: the record that lock, lease and ledger keep of the process, and what can be known of it later."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Fate = Literal["ended", "gone", "rebooted", "alive", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """A process that has, or had, a run folder for itself. Two hosts never compare their clocks by it."""

    token: int
    """The fencing token: the number of this runner. Each later one in the folder has a greater number."""
    host: str
    machine: str  # /etc/machine-id; empty where there is none
    boot: str  # id of the boot of the kernel, which containers share; empty where there is none
    processes: int  # inode of the namespace of process ids: a number means nothing outside it
    pid: int
    started: int  # clock ticks from the boot to the start of the process: the number may be given again
    since: str
    path: str  # the run folder, as this process saw it
    device: int
    inode: int
    lock: int = 0  # inode of the lock file that it holds; 0 where it holds none
    ended: bool = False
    """It has left the folder by itself."""
    ledger: int = 0
    """Version of the ledger whose hashes of rows it keeps; those before 8 do not say so."""

    @classmethod
    def here(cls, run_dir: Path, token: int = 0, lock: int = 0) -> Runner:
        """This process in a run folder."""
        folder = run_dir.stat()
        return cls(
            token=token,
            host=platform.node(),
            machine=_line("/etc/machine-id"),
            boot=_line("/proc/sys/kernel/random/boot_id"),
            processes=_namespace(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            path=os.path.realpath(run_dir),
            device=folder.st_dev,
            inode=folder.st_ino,
            lock=lock,
        )

    @classmethod
    def read(cls, value: Any) -> Runner | None:
        """From the JSON of a file, or from a value of the ledger; None where it is no record of a runner."""
        try:
            found = json.loads(value) if isinstance(value, (str, bytes)) else value
            return cls(**{name: found[name] for name in FIELDS if name in found})
        except (ValueError, TypeError, KeyError):
            return None

    def written(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {name: getattr(self, name) for name in FIELDS}

    def is_in(self, folder: Runner) -> bool:
        """Whether it works in the very folder that `folder` names, and not in a copy. A folder that was moved within its
        file system is the same one; the number of the device may differ from host to host."""
        return self.inode == folder.inode and (self.device == folder.device or self.path == folder.path)

    @property
    def fate(self) -> Fate:
        """What became of it, as far as this process can tell: it left by itself, its process is not there any more, its machine
        was started anew, it works, or nothing is known."""
        if self.ended:
            return "ended"
        here = (platform.node(), _line("/etc/machine-id"))
        boot = _line("/proc/sys/kernel/random/boot_id")
        if not boot or not self.boot:
            return "unknown"
        if self.boot != boot:
            return "rebooted" if here == (self.host, self.machine) else "unknown"
        if self.processes != _namespace():
            return "unknown"
        return "alive" if _started(self.pid) == self.started else "gone"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


FIELDS = tuple(field.name for field in dataclasses.fields(Runner))


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _started(pid: int) -> int | None:
    """Clock ticks from the boot to the start of a process; None where there is none of that number, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
