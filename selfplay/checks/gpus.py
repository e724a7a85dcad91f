"""Looks at the GPUs: whether those that `placement` names are there and free, and hold what each role keeps on them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from selfplay.checks import sizes
from selfplay.checks.finding import Finding, Level
from selfplay.config import Config, RewardSource
from selfplay.errors import ConfigError, InputError
from selfplay.generation.groups import groups
from selfplay.planning import memory
from selfplay.planning.memory import GIB
from selfplay.processes import gpus as processes
from selfplay.training import launch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
REWARD_TOKENS = 16_384  # of a batch of the reward server on a GPU
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that the controller may use. Its number in the configuration is its place among them."""

    smi: str  # its number, or its UUID, for `nvidia-smi`
    name: str
    total: float  # bytes; 0 for a part of a GPU (MIG), which nvidia-smi does not list
    free: float  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Which GPUs each role uses, by their numbers in the configuration."""

    engines: tuple[tuple[int, ...], ...]
    trainer: tuple[int, ...]
    scorers: Mapping[str, tuple[int, ...]]
    """Of each reward and judge that is a model of ours, by its key in the configuration."""


def visible() -> list[Gpu]:
    """The GPUs that this process may use, in the order of their numbers; none without nvidia-smi. Raises InputError."""
    if not shutil.which(QUERY[0]):
        return []
    answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        raise InputError(f"nvidia-smi failed: {answer.stdout.strip() or answer.stderr.strip()}")
    there: dict[str, Gpu] = {}
    for line in filter(str.strip, answer.stdout.splitlines()):
        index, uuid, name, total, free = (part.strip() for part in line.split(","))
        there[uuid] = Gpu(smi=index, name=name, total=float(total) * 2**20, free=float(free) * 2**20)
    names = processes.listed()
    if names is None:
        return list(there.values())
    found = []
    for name in names:  # CUDA takes no notice of what follows a name that is not there
        by_number = [gpu for gpu in there.values() if gpu.smi == name]
        by_uuid = [gpu for uuid, gpu in there.items() if uuid.startswith(name)]
        if name.startswith("MIG-"):
            by_uuid = [Gpu(smi=name, name="part of a GPU", total=0.0, free=0.0)]
        if not (by_number or by_uuid):
            break
        found.append((by_number or by_uuid)[0])
    return found


def roles(config: Config, count: int) -> Roles:
    """Who uses which of `count` GPUs. Raises ConfigError where engines ask for more than there are."""
    place, engine, everyone = config.placement, config.generate.engine, tuple(range(count))
    alone = tuple(i for i in place.generator or everyone if i < count)[: engine.tensor_parallel]
    engines = [alone] if config.generate.engines == 1 else [group or () for group in groups(config, count)]
    trainer = tuple(i for i in place.trainer or everyone if i < count)
    return Roles(
        engines=tuple(group for group in engines if group),
        trainer=trainer[: launch.read(config.train.accelerate).processes],
        scorers={
            key: used
            for key, source in config.all_sources().items()
            if source.model is not None and (used := _scorer(config, source, everyone))
        },
    )


def _scorer(config: Config, source: RewardSource, everyone: tuple[int, ...]) -> tuple[int, ...]:
    """The GPUs of a reward model that a child of ours serves."""
    place = config.placement
    own = tuple(i for i in place.reward or everyone if i in everyone)
    several = place.shared or len(place.reward or ()) > 1
    if source.device == "all" or (source.device == "auto" and several):
        return own
    if source.device in ("auto", "cuda"):
        return own[:1]
    named = [part.strip().removeprefix("cuda:") for part in source.device.split(",")]
    return tuple(own[int(n)] for n in named if n.isdigit() and int(n) < len(own))


def gpus(config: Config, run_dir: object) -> Iterator[Finding]:
    """Whether the GPUs that `placement` names are there, are free, and are large enough."""
    if config.cluster is not None:  # the look at the cluster tells
        return
    place, there = config.placement, visible()
    if not there:
        if place.colocated or place.generator or place.trainer or place.reward:
            why = (
                "nvidia-smi is not there"
                if shutil.which(QUERY[0]) is None
                else "none is visible (CUDA_VISIBLE_DEVICES)"
            )
            yield Finding.error("gpu", f"placement names GPUs, but {why}")
        else:
            yield Finding.ok("gpu", "there is no GPU: everything runs on the CPU")
            yield from _engines(config, 0)
        return
    told = list(_never_met(config, len(there)))
    yield from told
    if all(finding.level != "error" for finding in told):
        yield from too_small(config, there)
    for i, gpu in enumerate(there):
        called = f"GPU {i}" + ("" if gpu.smi == str(i) else f" ({gpu.smi} of nvidia-smi)")
        if not gpu.total:
            yield Finding.warning("gpu", f"{called} is {gpu.name}: how much memory it has is not known here")
            continue
        level: Level = "ok" if gpu.free > 0.9 * gpu.total else "warning"
        yield Finding(level, "gpu", f"{called} {gpu.name}: {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free")


def _never_met(config: Config, count: int) -> Iterator[Finding]:
    """Errors where `placement`, engines or processes ask for GPUs that are not there, or for one GPU twice."""
    place, everyone = config.placement, list(range(count))
    for role in ("generator", "trainer", "reward"):
        for i in getattr(place, role) or ():
            if i not in everyone:
                yield Finding.error("gpu", f"placement.{role} names GPU {i}; there are {everyone}")
    parallel, generator = config.generate.engine.tensor_parallel, place.generator or everyone
    if config.generate.engines == 1 and parallel > len(generator):
        text = f"{_several(parallel)} needed, the generator has {len(generator)} ({generator})"
        yield Finding.error("generate.engine.tensor_parallel", text)
    yield from _engines(config, count)
    trainer, launched = place.trainer or everyone, launch.read(config.train.accelerate).processes
    if launched > len(trainer):
        text = f"{_several(launched)} needed, the trainer has {len(trainer)} ({trainer})"
        yield Finding.error("train.accelerate", text)
    elif place.trainer is not None and launched < len(trainer):
        text = f"the trainer has {len(trainer)} GPUs ({trainer}), and its {launched} processes use the first ones"
        yield Finding.warning("train.accelerate", f"{text}: set num_processes to {len(trainer)}")


def _engines(config: Config, count: int) -> Iterator[Finding]:
    """An error where engines ask for GPUs, or for cores of the CPU, that are not there."""
    try:
        groups(config, count)
    except ConfigError as error:
        yield Finding.error("generate.engines", f"{error}; {error.hint}".removeprefix("generate.engines: "))


def _several(count: int) -> str:
    return f"{count} GPUs are" if count > 1 else "1 GPU is"


def too_small(config: Config, there: Sequence[Gpu]) -> Iterator[Finding]:
    """Errors where a GPU has less memory than it is to hold at some moment of a round."""
    for i, moments in held(config, there).items():
        total = there[i].total
        for moment, parts in moments.items():
            if total and sum(parts.values()) > total:
                said = " + ".join(f"{what} {size / GIB:.1f}" for what, size in parts.items())
                text = f"GPU {i} has {total / GIB:.1f} GiB, and has to hold at least {said} GiB {moment}"
                yield Finding.error("gpu memory", text)
    policy, engine = sizes.parameters(config.policy.model, config.policy.revision), config.generate.engine
    share = min((engine.gpu_memory_utilization * gpu.total for gpu in there if gpu.total), default=0.0)
    weights = (policy or 0) * DTYPE_BYTES[config.policy.dtype] / engine.tensor_parallel
    if share and weights > share:
        text = f"the policy's weights take {weights / GIB:.1f} GiB of each GPU, vLLM may use {share / GIB:.1f}"
        yield Finding.error("generate.engine.gpu_memory_utilization", text)


def held(config: Config, there: Sequence[Gpu]) -> dict[int, dict[str, dict[str, float]]]:
    """What each GPU holds at least at each moment of a round: GPU → moment → who → bytes.

    What is not known, such as a model whose size the Hub does not tell, counts nothing.
    """
    place, use = config.placement, roles(config, len(there))
    engine = config.generate.engine.gpu_memory_utilization
    trainer = sum(trainer_parts(config).values())
    scorers = {key: scorer_bytes(source) for key, source in config.all_sources().items()}
    found: dict[int, dict[str, dict[str, float]]] = {}
    for i, gpu in enumerate(there):
        sampling = {"engine": engine * gpu.total} if any(i in group for group in use.engines) else {}
        asleep = {"sleeping engine": memory.ASLEEP} if sampling and gpu.total else {}
        training = {"trainer": trainer} if i in use.trainer else {}
        scoring = {key: size for key, size in scorers.items() if size and i in use.scorers.get(key, ())}
        if place.shared:
            reward = {key: size for key, size in scoring.items() if key in config.reward_sources()}
            judge = {key: size for key, size in scoring.items() if key not in reward}
            moments = {
                "while the engines sample": sampling,
                "while the reward scores": asleep | reward,
                "while the judge scores": asleep | judge if judge else {},
                "while the trainer works": asleep | training,
            }
        elif place.colocated:
            moments = {
                "while the engine samples": scoring | sampling,
                "while the trainer works": scoring | asleep | training,
            }
        else:
            moments = {"": scoring | sampling | training}
        found[i] = {moment: parts for moment, parts in moments.items() if any(parts.values())}
    return found


def trainer_parts(config: Config) -> dict[str, float]:
    """What the trainer keeps on each of its GPUs, in bytes by what it is; nothing where the policy's size is not known."""
    shape, settings = sizes.shape(config.policy.model, config.policy.revision), config.train
    if shape is None:
        return {}
    launched = launch.read(settings.accelerate)
    return memory.trainer(
        shape,
        processes=launched.processes,
        shares=launched.shares,
        rank=settings.lora.r if settings.lora else None,
        reference=settings.lora is None or settings.reference != "previous",
        tokens=2 * settings.micro_batch_pairs * settings.max_length,
        bf16=settings.bf16,
        checkpointing=settings.gradient_checkpointing,
    )


def scorer_bytes(source: RewardSource) -> float:
    """What a reward model keeps on each of its GPUs; 0 where its size is not known."""
    shape = sizes.shape(source.model)
    return 0.0 if shape is None else sum(memory.reward(shape, DTYPE_BYTES[source.dtype], REWARD_TOKENS).values())
