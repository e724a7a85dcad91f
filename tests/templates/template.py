"""A process that has imported what a child of the service imports, and forks: `python template.py NAME SOCKET`.

It imports when it is asked for the first fork. It ends with its stdin, and all forks end with it. A fork whose asker is gone is
killed, with all that it started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

from asking import read_by_imports  # noqa: E402

from selfplay.processes.guard import PR_SET_PDEATHSIG  # noqa: E402
from selfplay.processes.protocol import quick_imports  # noqa: E402
from selfplay.processes.reaping import descendants  # noqa: E402


def imports(name: str) -> None:
    """What engines (`vllm`), and trainers and models that score (`trl`), import."""
    before = dict(os.environ)
    with quick_imports():
        if name == "vllm":
            from selfplay.generation.engine import cpu_build, prepare

            prepare(cpu_build(), 1)
            import vllm
            from vllm import LLM, SamplingParams  # noqa: F401
            from vllm.v1.engine.exceptions import EngineDeadError  # noqa: F401

            if cpu_build():
                import vllm.v1.worker.cpu_worker  # noqa: F401
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            import selfplay.training.depth_job
            import selfplay.training.train_job  # noqa: F401
    import sklearn.cluster  # noqa: F401

    for module in [name for name in sys.modules if name.split(".")[0] in ("selfplay", "reward")]:
        del sys.modules[module]  # a fork runs the code of the tree that it was started in
    os.environ.clear()
    os.environ.update(before)
    gc.freeze()
    running = {thread.joinpath("comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()}
    # A fork lacks all threads but one. That of pyarrow's jemalloc is started again where it is needed.
    assert threading.active_count() == 1 and len(running - {"jemalloc_bg_thd"}) == 1, running


class Forks:
    """The forks that live, each with the connection of its asker."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.alike = read_by_imports(dict(os.environ))
        self.waiting = selectors.DefaultSelector()
        self.askers: dict[int, socket.socket] = {}  # by the process id of the fork
        self.imported = False

    def serve(self) -> dict[str, Any] | None:
        """Take requests until stdin is closed. In a fork it returns what the fork is to do."""
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(self.address)
        self.listener.listen(64)
        self.waiting.register(self.listener, selectors.EVENT_READ)
        self.waiting.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in self.waiting.select():
                if key.fileobj == 0:
                    self.end()
                    return None
                if key.fileobj is self.listener:
                    asker, _ = self.listener.accept()
                    with contextlib.suppress(OSError):  # it is gone already, and is heard to be
                        asker.send(json.dumps(self.alike).encode())
                    self.waiting.register(asker, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    if (order := self.heard(key.fileobj)) is not None:
                        return order
                else:
                    self.ended(key.data)

    def heard(self, asker: socket.socket) -> dict[str, Any] | None:
        try:
            said, pipes, _, _ = socket.recv_fds(asker, 1 << 20, 3)
        except OSError:
            said, pipes = b"", []
        if not said:  # the asker is gone
            self.waiting.unregister(asker)
            asker.close()
            for pid in [pid for pid, each in self.askers.items() if each is asker]:
                kill(pid)
            return None
        if not self.imported:
            imports(self.name)
            self.imported = True
        fork = os.fork()
        if fork == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            self.waiting.close()
            for number, pipe in enumerate(pipes):
                os.dup2(pipe, number)
                os.close(pipe)
            self.listener.close()
            asker.close()
            for other in self.askers.values():
                other.close()
            return json.loads(said)
        for pipe in pipes:
            os.close(pipe)
        self.askers[fork] = asker
        watched = os.pidfd_open(fork)
        self.waiting.register(watched, selectors.EVENT_READ, (fork, watched))
        with contextlib.suppress(OSError):
            asker.send(str(fork).encode())
        return None

    def ended(self, which: tuple[int, int]) -> None:
        fork, watched = which
        self.waiting.unregister(watched)
        os.close(watched)
        _, status = os.waitpid(fork, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(fork, signal.SIGKILL)  # what it left behind
        with contextlib.suppress(OSError):
            self.askers.pop(fork).send(str(os.waitstatus_to_exitcode(status)).encode())

    def end(self) -> None:
        for pid in self.askers:
            kill(pid)
        Path(self.address).unlink(missing_ok=True)


def kill(fork: int) -> None:
    for pid in [fork, *descendants(fork)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def become(order: dict[str, Any]) -> None:
    """Run the module that the asker was to run."""
    os.setsid()
    os.umask(order["umask"])
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path[:] = order["path"]
    sys.argv[:] = ["-m", *order["argv"]]
    tempfile.tempdir = None
    import torch

    argv = order["argv"]
    threads = argv[argv.index("--cpu-threads") + 1] if "--cpu-threads" in argv else os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads or len(os.sched_getaffinity(0))))
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        import torch._dynamo

        torch._dynamo.config.disable = True
    code = 1
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # to take the modules apart, as Python does at its end, would copy all that is shared with the template
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    name, address = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    todo = Forks(name, address).serve()
    if todo is not None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        become(todo)
