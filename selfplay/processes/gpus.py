"""Which GPUs this process may give to its children, and the environment of a child that gets some of them.

A number in the configuration is a place among the GPUs that the controller may use. Where a scheduler has set
CUDA_VISIBLE_DEVICES to `4,5,6,7`, number 0 is the GPU 4, and the GPUs of others cannot be named at all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from selfplay.errors import ConfigError

ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""CUDA would number the fastest GPU first. `nvidia-smi`, and whoever reads it, numbers them by their place in the machine."""


def listed() -> list[str] | None:
    """The names in CUDA_VISIBLE_DEVICES: numbers or UUIDs. None where it is not set, and all GPUs may be used.

    As CUDA reads it: what comes after a name that is no GPU does not count.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    names: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            break
        names.append(name)
    return names


def count() -> int:
    """GPUs that this process and its children may use, as far as that can be told without their driver."""
    names = listed()
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) if names is None else len(names)


def environment(gpus: Sequence[int] | None) -> dict[str, str]:
    """Variables for a child that gets the GPUs with these numbers; all that this process may use where it is None.

    Raises ConfigError for a number that is not among them.
    """
    names = listed()
    if gpus is None:
        return {**ORDER}
    if names is not None and (absent := [gpu for gpu in gpus if gpu >= len(names)]):
        raise ConfigError(
            f"placement names GPU {absent[0]}, but CUDA_VISIBLE_DEVICES has {len(names)}: {', '.join(names) or 'none'}",
            "numbers begin at 0, and count the GPUs that are visible here",
        )
    told = [str(gpu) if names is None else names[gpu] for gpu in gpus]
    return {**ORDER, "CUDA_VISIBLE_DEVICES": ",".join(told)}
