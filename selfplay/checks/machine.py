"""Looks at the machine: the trainer's processes, the disk and the memory.

What is needed is a lower bound everywhere: caches and libraries come on top.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from selfplay.checks import sizes
from selfplay.checks.finding import Finding, Level
from selfplay.checks.gpus import DTYPE_BYTES
from selfplay.config import Config, Ema
from selfplay.planning.memory import GIB
from selfplay.training import launch

MASTERS, REFERENCE, OPTIMIZER = 4, 4, 12  # bytes a parameter, fp32; the optimizer: gradient and two moments
CPUINFO = Path("/proc/cpuinfo")
SAVE = 12  # bytes a parameter that a save of the trainer takes: weights and two moments


def policy_bytes(config: Config, count: int) -> int:
    """Bytes on disk of a policy of `count` parameters.

    The weights are there in the precision that is served, and once more in fp32 unless that is the same.
    """
    served = DTYPE_BYTES[config.policy.dtype]
    return count * (served + (MASTERS if served != 4 else 0))


def batches(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether a step's pairs can be shared evenly among the trainer's processes."""
    settings = config.train
    if settings.accelerate is None:
        return
    processes = launch.read(settings.accelerate).processes
    together = settings.micro_batch_pairs * processes
    said = f"{settings.batch_pairs} pairs a step on {processes} processes, {settings.micro_batch_pairs} at a time each"
    if settings.batch_pairs % together:
        yield Finding.error("train.batch_pairs", f"{said}: not a multiple of {together}")
    else:
        yield Finding.ok("training", said)


def precision(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether a processor that samples or trains computes in bfloat16, where it is asked to."""
    asked = {
        "policy.dtype: float32": config.policy.dtype == "bfloat16",
        "train.bf16: false": config.train.bf16,
    }
    if config.cluster is not None or shutil.which("nvidia-smi") or not any(asked.values()) or not CPUINFO.is_file():
        return
    if "bf16" in CPUINFO.read_text(encoding="utf-8"):  # avx512_bf16, amx_bf16, or that of an ARM processor
        return
    faster = " and ".join(setting for setting, wanted in asked.items() if wanted)
    yield Finding.warning(
        "precision", f"this processor does not compute in bfloat16, so it is much slower in it: set {faster}"
    )


def disk(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the run folder's disk holds the policies that retention keeps, and the saves of the trainer."""
    where = next(p for p in [run_dir, *run_dir.resolve().parents] if p.exists())
    free = shutil.disk_usage(where).free
    count = sizes.parameters(config.policy.model, config.policy.revision)
    if count is None:
        said = f"{free / GIB:.1f} GiB free in {where}; the policy's size is not known yet"
        yield Finding.warning("disk", said)
        return
    rule, rounds = config.retention, config.schedule.end.rounds
    forever = bool(rule.every) and rounds is None
    # Four more than the last ones: the current policy, its parent and the reference, and the candidate of the round.
    kept = rule.last + 4 + rule.rejected_rounds + len(rule.pinned)
    kept += rounds // rule.every if rule.every and rounds is not None else 0
    each = policy_bytes(config, count)
    trainer = 0 if config.train.lora else 2 * SAVE * count
    if isinstance(config.train.reference, Ema):  # the average of this round, and that of the round before
        trainer += 2 * MASTERS * count
    need = kept * each + trainer
    said = (
        f"{free / GIB:.1f} GiB free in {where}; {kept} policies and two saves of the trainer need {need / GIB:.2f} GiB"
    )
    if forever:
        said += f", and {each / GIB:.2f} GiB more every {rule.every} rounds, without end (retention.every)"
    level: Level = "error" if free <= need else "warning" if forever else "ok"
    yield Finding(level, "disk", said)


def memory(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the machine has the main memory that a round takes."""
    if config.cluster is not None:  # the children are elsewhere
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = sizes.parameters(config.policy.model, config.policy.revision)
    if count is None:
        yield Finding.ok("memory", f"{total / GIB:.0f} GiB of host memory")
        return
    if shutil.which("nvidia-smi"):
        need: float = count * 2 * MASTERS  # policy and reference are loaded there, and compared after training
    else:  # trainer, reference, engine and reward model share it
        need = count * (MASTERS + REFERENCE + OPTIMIZER + DTYPE_BYTES[config.policy.dtype])
        need += config.generate.engine.cpu_kv_cache_gib * GIB
    need += 3 * GIB  # each process has its libraries
    said = f"{total / GIB:.0f} GiB of host memory; a round needs about {need / GIB:.1f} GiB"
    yield Finding("ok" if total > need else "error", "memory", said)
