"""The side of the process that was started: it asks a template for a fork, and ends as that ends."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys

READ_BY_IMPORTS = (
    "HF_",
    "HUGGINGFACE",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "DATASETS_",
    "LD_PRELOAD",
    "PYTHONHASH",
    "HOME",
    "XDG_",
)
"""Variables with such names are read while libraries are imported. Where they differ, a process imports for itself."""
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_BY_IMPORTS)}


def ask(address: str) -> None:
    """Never returns if the template makes the fork. It does not where it read another environment, or is not there any more."""
    environment = dict(os.environ)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as template:
        try:
            template.connect(address)
            alike = json.loads(template.recv(1 << 16))
            if read_by_imports(environment) != alike:
                return
            words = sys.orig_argv
            at = words.index("-m")
            order = {
                "module": words[at + 1], "argv": words[at + 2 :], "environment": environment, "folder": os.getcwd(),
                "path": [*([] if "-P" in words[:at] else [os.getcwd()]), *sys.path],
            }  # fmt: skip
            mask = os.umask(0)
            os.umask(mask)
            socket.send_fds(template, [json.dumps(order | {"umask": mask}).encode()], [0, 1, 2])
            fork = int(template.recv(64))
        except (OSError, ValueError):
            return
        if "SELFPLAY_GUARDED" in environment:  # what it would have asked the kernel for itself
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: pass_on(fork, number))
        for number in (0, 1):
            os.close(number)
        code = int(template.recv(64) or b"-9")
    if code < 0:  # it ended by a signal, and so does this process
        with contextlib.suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def pass_on(fork: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(fork, number)
