"""Looks at the machine: the trainer's processes, the disk, the memory and the GPUs.

What is needed is a lower bound everywhere: activations, caches and libraries come on top.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from selfplay.checks.finding import Finding, Level
from selfplay.checks.models import elements
from selfplay.config import Config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
GIB = 1 << 30
MASTERS, REFERENCE, OPTIMIZER = 4, 4, 12  # bytes a parameter, fp32; the optimizer: gradient and two moments
SAVE = 12  # bytes a parameter that a save of the trainer takes: weights and two moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What the file of `train.accelerate` says about the trainer's processes."""

    processes: int
    shares: int  # processes that one copy of the model is spread over


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    index: int
    name: str
    total: float  # bytes
    free: float  # bytes


def launched(config: Config) -> Launched:
    """How the trainer will be launched: by the accelerate file, or as a single process without one."""
    path = config.train.accelerate
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
    if not isinstance(found, dict):
        return Launched(processes=1, shares=1)
    processes = int(found.get("num_processes", 1))
    return Launched(processes=processes, shares=processes if found.get("distributed_type") == "FSDP" else 1)


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
    if not settings.accelerate.is_file():
        yield Finding.error("train.accelerate", f"{settings.accelerate}: no such file")
        return
    processes = launched(config).processes
    together = settings.micro_batch_pairs * processes
    said = f"{settings.batch_pairs} pairs a step on {processes} processes, {settings.micro_batch_pairs} at a time each"
    if settings.batch_pairs % together:
        yield Finding.error("train.batch_pairs", f"{said}: not a multiple of {together}")
    else:
        yield Finding.ok("training", said)


def disk(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the run folder's disk holds the policies that retention keeps, and the saves of the trainer."""
    where = next(p for p in [run_dir, *run_dir.resolve().parents] if p.exists())
    free = shutil.disk_usage(where).free
    count = elements(config.policy.model)
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
    need = kept * each + trainer
    said = (
        f"{free / GIB:.1f} GiB free in {where}; {kept} policies and two saves of the trainer need {need / GIB:.2f} GiB"
    )
    if forever:
        said += f", and {each / GIB:.2f} GiB more every {rule.every} rounds, without end (retention.every)"
    level: Level = "error" if free <= need else "warning" if forever else "ok"
    yield Finding(level, "disk", said)


def memory(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether a machine without GPUs has the memory that a round takes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    count = elements(config.policy.model)
    if count is None or shutil.which("nvidia-smi"):
        yield Finding.ok("memory", f"{total / GIB:.0f} GiB of host memory")
        return
    # Trainer, reference, engine and reward model share the memory, and each process has its libraries.
    need = count * (MASTERS + REFERENCE + OPTIMIZER + DTYPE_BYTES[config.policy.dtype])
    need += config.generate.engine.cpu_kv_cache_gib * GIB + 3 * GIB
    said = f"{total / GIB:.0f} GiB of host memory; a round needs about {need / GIB:.1f} GiB"
    yield Finding("ok" if total > need else "error", "memory", said)


def gpus(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the GPUs that `placement` names are there, are free, and are large enough."""
    placement = config.placement
    if not shutil.which("nvidia-smi"):
        if placement.colocated or placement.generator or placement.trainer or placement.reward:
            yield Finding.error("gpu", "placement names GPUs, but nvidia-smi is not there")
        else:
            yield Finding.ok("gpu", "there is no GPU: everything runs on the CPU")
        return
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        said = answer.stdout.strip() or answer.stderr.strip()
        yield Finding.error("gpu", f"nvidia-smi failed: {said}")
        return
    rows = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    there = {int(i): Gpu(index=int(i), name=name, total=float(total) * 2**20, free=float(free) * 2**20) for i, name, total, free in rows}  # fmt: skip
    named = [(role, i) for role in ("generator", "trainer", "reward") for i in getattr(placement, role) or []]
    unknown = [(role, i) for role, i in named if i not in there]
    for role, i in unknown:
        yield Finding.error("gpu", f"placement.{role} names GPU {i}; there are {sorted(there)}")
    if not unknown:
        yield from _shared(config, there)
    for gpu in there.values():
        level: Level = "ok" if gpu.free > 0.9 * gpu.total else "warning"
        said = f"GPU {gpu.index} {gpu.name}: {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free"
        yield Finding(level, "gpu", said)


def _shared(config: Config, there: dict[int, Gpu]) -> Iterator[Finding]:
    """Errors where processes want more GPUs than their role has, or where a GPU is too small for what it is to hold."""
    visible = sorted(there)
    if (asked := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        visible = [int(i) for i in asked.split(",") if i.strip().isdigit() and int(i) in there]
    generator = config.placement.generator or visible
    trainer = config.placement.trainer or visible
    wanted = (
        ("generate.engine.tensor_parallel", config.generate.engine.tensor_parallel, generator, "generator"),
        ("train.accelerate", launched(config).processes, trainer, "trainer"),
    )
    for key, count, have, role in wanted:
        if count > len(have):
            said = f"{count} GPUs are needed, the {role} has {len(have)} ({have})"
            yield Finding.error(key, said)
    held = _held(config, visible, there)
    for i, parts in held.items():
        said = " + ".join(f"{role} {size / GIB:.1f}" for role, size in parts.items())
        if sum(parts.values()) > there[i].total:
            text = f"GPU {i} has {there[i].total / GIB:.1f} GiB, and has to hold at least {said} GiB"
            yield Finding.error("gpu memory", text)
    policy, engine = elements(config.policy.model), config.generate.engine
    if policy is not None and generator:
        weights = policy * DTYPE_BYTES[config.policy.dtype] / engine.tensor_parallel
        share = engine.gpu_memory_utilization * there[generator[0]].total
        if weights > share:
            text = f"the policy's weights take {weights / GIB:.1f} GiB of each GPU, vLLM may use {share / GIB:.1f}"
            yield Finding.error("generate.engine.gpu_memory_utilization", text)


def _held(config: Config, visible: list[int], there: dict[int, Gpu]) -> dict[int, dict[str, float]]:
    """The bytes that each role needs at least on each GPU, at the moment when the GPU holds most: GPU → role → bytes."""
    held: dict[int, dict[str, float]] = {i: {} for i in there}
    launch, engine, count = launched(config), config.generate.engine, elements(config.policy.model)
    for i in (config.placement.generator or visible)[: engine.tensor_parallel]:
        held[i]["engine"] = engine.gpu_memory_utilization * there[i].total
    if count is not None:
        same = config.train.reference == "previous"
        a_parameter = MASTERS + (0 if same else REFERENCE) if config.train.lora else MASTERS + REFERENCE + OPTIMIZER
        for i in (config.placement.trainer or visible)[: launch.processes]:
            held[i]["trainer"] = count * a_parameter / launch.shares
    for key, source in (config.reward_sources() | config.judge_sources()).items():
        size = elements(source.model)
        if size is None or source.device not in ("auto", "all", "cuda"):
            continue
        everywhere = source.device == "all" or (source.device == "auto" and len(config.placement.reward or ()) > 1)
        devices = config.placement.reward or visible
        for i in devices if everywhere else devices[:1]:
            held[i][key] = size * DTYPE_BYTES[source.dtype]
    if config.placement.colocated:  # engine and trainer take turns
        for parts in held.values():
            both = {role: parts.pop(role, 0.0) for role in ("engine", "trainer")}
            larger = max(both, key=lambda role: both[role])
            parts[larger] = both[larger]
    return held
