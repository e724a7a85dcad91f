"""What went wrong outside the product, in words: file systems, disks, files that are not what was written, memory.

A bug is what is left.
"""

from __future__ import annotations

import errno
import json
import struct
import zipfile
import zlib

import pyarrow as pa

from selfplay.errors import SelfplayError
from selfplay.storage import folders

DOCTOR = "`selfplay doctor` says which file of the run folder is damaged, and mends what can be mended"
_ADVICE = {
    **folders.REFUSALS,
    errno.EIO: "the disk could not read or write: look at the log of the kernel (dmesg), and copy the run folder to another disk",
    errno.ESTALE: "the network file system has lost the file: mount it again, then run the same command again",
    errno.ENOTCONN: "the network file system is gone: mount it again, then run the same command again",
    errno.ENOENT: f"it was there: has something deleted it? Put it back from a copy; {DOCTOR}",
    errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE of the unit), then run the same command again",
    errno.ENFILE: "this machine has too many open files: end what has them, then run the same command again",
    errno.ENOMEM: "give it more memory, or lower what the plan of `selfplay check` counts",
    errno.EAGAIN: "this machine has too many processes: raise the limit (ulimit -u, TasksMax of the unit)",
}
_UNREADABLE = (
    json.JSONDecodeError,
    UnicodeDecodeError,
    pa.ArrowException,
    zlib.error,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
)


def explained(error: Exception) -> SelfplayError | None:
    """An error that is nobody's bug, in words and with what to do; None for any other."""
    if isinstance(error, MemoryError):
        return SelfplayError("there is no memory left", _ADVICE[errno.ENOMEM])
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or type(error).__name__
        return SelfplayError(f"{where}{what}", _ADVICE.get(error.errno, "repair that, then run the same command again"))
    if isinstance(error, _UNREADABLE) or (isinstance(error, OSError) and error.errno is None):
        return SelfplayError(f"a file cannot be read ({type(error).__name__}: {error})", DOCTOR)
    return None
