"""Files as a child on another node sees them: they have to be those that the controller has hashed.

The controller names the files that an order is about, with their hashes, and the child reads them before it does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.storage import hashes

FILES = "files"
"""The field of an order: path → SHA-256. It is left out for a child that runs beside the controller."""


def told(paths: Iterable[Path]) -> dict[str, str]:
    """The field for files that the controller sees. Those that it has hashed before are not read again."""
    files = list(dict.fromkeys(path.absolute() for path in paths))
    return dict(zip(map(str, files), hashes.sha256_of(files), strict=True))


def require(order: Mapping[str, Any]) -> None:
    """Raise CheckpointError where this node sees other files than those that an order names."""
    try:
        hashes.verify_files(Path("/"), order.get(FILES, {}), CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"seen from {os.uname().nodename}: {error}", error.hint) from error
