"""What the file of `train.accelerate` says about the trainer's processes. The controller and `selfplay check` read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfplay.errors import InputError

# Of the kinds that accelerate knows, those for which its launcher starts `num_processes` processes on a machine with GPUs.
SEVERAL = ("MULTI_GPU", "FSDP", "DEEPSPEED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The processes of a trainer."""

    processes: int
    shares: int
    """Processes that one copy of the model is spread over; 1 where each holds all of it."""


def read(path: Path | None) -> Launch:
    """How the trainer is launched: by this file, or as a single process without one.

    Raises InputError for a file that is not there, is no configuration of accelerate, or would start other processes
    than it says, or a trainer that refuses to work.
    """
    if path is None:
        return Launch(processes=1, shares=1)
    settings = _settings(path)
    kind, processes = settings.get("distributed_type", "NO"), settings.get("num_processes", 1)
    if not isinstance(processes, int) or processes < 1:
        raise _wrong(path, f"num_processes is {processes!r}", "set it to the number of GPUs that train")
    if settings.get("num_machines", 1) != 1:
        raise _wrong(path, f"num_machines is {settings['num_machines']}", "a trainer runs on one machine: set it to 1")
    if processes > 1 and kind not in SEVERAL:
        hint = f"set distributed_type to one of {', '.join(SEVERAL)}, or num_processes to 1"
        raise _wrong(
            path, f"num_processes is {processes}, but for distributed_type {kind} one process is started", hint
        )
    version = (settings.get("fsdp_config") or {}).get("fsdp_version", 1)
    if kind == "FSDP" and version != 2:
        raise _wrong(path, f"fsdp_version is {version}", "FSDP 1 flattens the output head away: set it to 2")
    return Launch(processes=processes, shares=processes if kind == "FSDP" else 1)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _wrong(path, "no such file", "see configs/accelerate/ for examples")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _wrong(path, f"not YAML: {error}", "see configs/accelerate/ for examples") from error
    if not isinstance(found, dict):
        raise _wrong(path, "not a configuration of accelerate", "see configs/accelerate/ for examples")
    return found


def _wrong(path: Path, what: str, hint: str) -> InputError:
    return InputError(f"train.accelerate: {path}: {what}", hint)
