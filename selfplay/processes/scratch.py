"""A folder of its own for the temporary files of each child. It goes with the child, and so nothing is left of many starts.

Libraries leave files there, vLLM some at each start. The folder is not in the run folder: sockets are among the files, and
the path of a socket must be short.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from selfplay.errors import DiskError

LONGEST_SOCKET = 107  # bytes of a socket's path, from <linux/un.h>
SOCKET = "VLLM_RPC_BASE_PATH"  # An environment variable: where vLLM has its sockets, which have a UUID for a name.
HINT = "free some space there, or let TMPDIR name a folder on a disk that has some, and run the same command again"
NAME = 1 + 36  # bytes of a slash and a UUID


def make(run_dir: Path) -> Path:
    """A new folder for a child that works for `run_dir`. Only its owner can read it. It is beside that of a guard further up.

    Raises DiskError where there is no room for it.
    """
    temporary, prefix = _temporary(), _prefix(run_dir)
    beside = temporary.parent if temporary.name.startswith(prefix) else temporary
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    except OSError as error:
        raise DiskError(f"no folder can be made in {beside} for temporary files: {error.strerror}", HINT) from error


def variables(folder: Path) -> dict[str, str]:
    """What the child is told. What torch has compiled is for the next start too, and stays outside. So do the sockets of vLLM
    where their paths would become too long."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(folder.parent / f"torchinductor_{os.getuid()}"))
    found = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": compiled}
    if len(os.fsencode(folder)) + NAME > LONGEST_SOCKET and SOCKET not in os.environ:
        found[SOCKET] = str(folder.parent)
    return found


def remove(folder: Path) -> None:
    """Delete the folder of a child that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Delete what guards that were killed have left of the children of `run_dir`. None of them may live. Raises DiskError."""
    for folder in _temporary().glob(f"{_prefix(run_dir)}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                remove(folder)


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:  # each that it tried is full, or cannot be written
        raise DiskError(str(error.strerror), HINT) from error


def _prefix(run_dir: Path) -> str:
    return f"selfplay-{hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:8]}-"
