"""How much memory there is and how much was taken: of the GPU, or of the machine where there is none."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30


def free() -> float:
    """GiB that nobody holds, of the GPU or of the machine."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0]) / GIB
    return _field("/proc/meminfo", "MemAvailable")


def forget_peak() -> None:
    """Let the peak of this process count from now on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """GiB that tensors of this process took at most; without a GPU, all that the process took."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / GIB
    return _field("/proc/self/status", "VmHWM")


def _field(file: str, name: str) -> float:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / GIB
