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


def make(run_dir: Path) -> Path:
    """A new folder for a child that works for `run_dir`. Only its owner can read it."""
    return Path(tempfile.mkdtemp(prefix=_prefix(run_dir)))


def variables(folder: Path) -> dict[str, str]:
    """What the child is told. What torch has compiled is for the next start too, and stays where torch would put it."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(folder.parent / f"torchinductor_{os.getuid()}"))
    return {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": compiled}


def remove(folder: Path) -> None:
    """Delete the folder of a child that has ended."""
    shutil.rmtree(folder, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Delete what guards that were killed have left of the children of `run_dir`. None of them may live."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(run_dir)}*"):
        with contextlib.suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                remove(folder)


def _prefix(run_dir: Path) -> str:
    return f"selfplay-{hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:8]}-"
