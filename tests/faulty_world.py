"""File systems that lack something: a library before the system's calls, and a small runner of a run folder as a process."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mini import ROOT

RUNNER = """
import sys, time
from pathlib import Path
from selfplay.errors import SelfplayError
from selfplay.processes import children
from selfplay.processes.child import Child
from selfplay.storage import folders
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.policies import Policies

run_dir, locks, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
try:
    with RunLock(run_dir, locks, 8.0) as lock:
        store = Store(run_dir, lock)
        children.end_with(lock.claim)
        child = Child("sleep", ["sleep", "600"], run_dir=run_dir, log=run_dir / "logs" / "sleep.log")
        child.start()
        print(lock.runner.token, child.pid, flush=True)
        for step in range(steps):
            with folders.folder(run_dir / "rounds" / f"{lock.runner.token}-{step:04d}") as out:
                (out / "file").write_text(str(step))
            folders.write_json(run_dir / "last.json", lock.runner.token)
            store.event("step", str(lock.runner.token))
            time.sleep(0.05)
        child.stop(0)
        store.close()
except SelfplayError as error:
    print(f"{error}; {error.hint}", flush=True)
    sys.exit(error.exit_code)
"""


@functools.cache
def library() -> Path:
    """The compiled faults.c."""
    out = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", out, Path(__file__).with_name("faults.c"), "-ldl"], check=True
    )
    return out


def environment(root: Path | None = None, faults: str = "") -> dict[str, str]:
    """Of a process for which the file system below `root` has these faults."""
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    return found | {"LD_PRELOAD": str(library()), "FAULTS_ROOT": str(root), "FAULTS": faults} if faults else found


class Runner:
    """A process that works in a run folder, `steps` steps of a twentieth of a second."""

    def __init__(self, run_dir: Path, locks: str = "flock", steps: int = 2000, faults: str = "") -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  it is read as long as the process lives
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(run_dir), locks, str(steps)],
            stdout=self._said, stderr=subprocess.STDOUT, env=environment(run_dir.parent, faults),
        )  # fmt: skip

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read()

    def working(self) -> tuple[int, int]:
        """Wait until it works; its token, and the process id of the guard of its child."""
        until(lambda: len(self.said().split()) >= 2)
        assert self._process.poll() is None, self.said()
        token, child = self.said().split()[:2]
        return int(token), int(child)

    def ended(self) -> tuple[int, str]:
        """Wait until it has ended; exit code and all that it said."""
        return self._process.wait(60), self.said()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait(60)


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


HAS_COMPILER = shutil.which("cc") is not None
