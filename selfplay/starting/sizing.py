"""From numbers to begin with to numbers that this machine holds: they are changed until the plan of the memory confirms them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfplay.checks import gpus, machine
from selfplay.checks.gpus import Gpu
from selfplay.config import Config
from selfplay.errors import InputError
from selfplay.planning.memory import GIB
from selfplay.starting.presets import CPU, FSDP2, LORA, SMALL, Settings
from selfplay.starting.recognise import Data, Machine, Model

SMALL_MODEL = 50e6  # parameters up to which a model is trained from scratch, and at a high rate
ROOM = 0.75  # of an engine's memory that weights may take; the rest is for keys and values
BUFFERS = 0.05  # of a GPU, for what the plan does not count
UTILISATION = tuple(round(0.9 - 0.05 * step, 2) for step in range(13))
MICRO = (4, 2, 1)
KEPT = ((3, 2), (1, 1), (0, 0))  # policies, and rounds of rejected ones


def nested(settings: Settings) -> dict[str, Any]:
    """The settings as sections, without their reasons."""
    found: dict[str, Any] = {}
    for key, (value, _) in settings.items():
        *parents, last = key.split(".")
        section = found
        for name in parents:
            section = section.setdefault(name, {})
        section[last] = value
    return found


def for_data(settings: Settings, model: Model, data: Data | None) -> Settings:
    """Lengths that the model reads and the prompts need, and no more prompts than there are."""
    found = dict(settings)
    prompt, answer = settings["prompts.max_tokens"][0], settings["generate.max_tokens"][0]
    if data is not None and data.tokens is not None:
        prompt = min(prompt, 64 * math.ceil(data.tokens / 64))
        found["prompts.max_tokens"] = (
            prompt,
            f"99 % of the prompts have up to {data.tokens:,} tokens; longer ones are set aside",
        )
    if model.context is not None and prompt + answer + 1 > model.context:
        if prompt > model.context // 2:
            prompt = model.context // 2
            found["prompts.max_tokens"] = (prompt, f"half of the {model.context:,} tokens that the model reads")
        answer = min(answer, 16 * ((model.context - prompt - 1) // 16))
        found["generate.max_tokens"] = (answer, f"what the {model.context:,} tokens of the model leave to an answer")
    found["train.max_length"] = (prompt + answer, settings["train.max_length"][1])
    if data is not None:
        for key, there, what in (
            ("prompts.per_round", data.train, "to train on"),
            ("evaluate.prompts", data.heldout, "held out"),
            ("evaluate.audit_prompts", data.audit, "in the audit set"),
        ):
            if there and there < settings[key][0]:
                found[key] = (there, f"all that there are {what}")
    return found


def for_machine(settings: Settings, model: Model, there: Machine, accelerate: Path) -> Settings:
    """The same for the GPUs of this machine, or for its CPU. `accelerate`: a file that starts a process a GPU.

    Raises InputError where nothing fits, with the words of the plan.
    """
    count = len(there.gpus)
    if not count:
        found = _on_cpu(settings, model)
        _require(found, None, there)
        return found
    why = ""
    for candidate in _candidates(settings, model, there, accelerate):
        if not (why := _too_small(candidate, there.gpus)):
            _require(candidate, FSDP2.format(processes=count) if count > 1 else None, there)
            return candidate
    raise InputError(
        f"{model.name} does not fit on {there.said}: {why}", "take a smaller model, an adapter, or more GPUs"
    )


def _candidates(settings: Settings, model: Model, there: Machine, accelerate: Path) -> Iterator[Settings]:
    """What is tried: as given, then with smaller micro-batches, less for the engine, and at last an adapter."""
    count, size = len(there.gpus), min(gpu.total for gpu in there.gpus) or 80 * GIB
    weights = 2.0 * (model.parameters or 0)
    methods = [settings] if "train.lora.r" in settings else [settings, _as_adapter(settings)]
    for base, by_turns in product(methods, (False, True) if count == 1 else (True,)):
        for utilisation in UTILISATION:
            parallel = next((n for n in _divisors(count) if weights / n <= ROOM * utilisation * size), None)
            if parallel is None:
                continue
            for micro in MICRO:
                yield _placed(base, count, parallel, utilisation, micro, accelerate, by_turns)


def _placed(
    settings: Settings, count: int, parallel: int, utilisation: float, micro: int, accelerate: Path, by_turns: bool
) -> Settings:
    engines, step = count // parallel, micro * count
    why = settings["generate.engine.gpu_memory_utilization"][1]
    found = settings | {
        "generate.engines": (engines, f"each has {parallel} of the {count} GPUs" if count > 1 else "one GPU"),
        "generate.engine.gpu_memory_utilization": (utilisation, why),
        "generate.engine.tensor_parallel": (
            parallel, "its weights fit on one GPU" if parallel == 1 else f"its weights fit on {parallel} GPUs together"
        ),
        "train.micro_batch_pairs": (micro, settings["train.micro_batch_pairs"][1]),
        "train.batch_pairs": (step * math.ceil(settings["train.batch_pairs"][0] / step), settings["train.batch_pairs"][1]),
    }  # fmt: skip
    if not by_turns:
        return found | {
            "placement.colocated": (True, "engine and trainer take turns on the GPU; the reward model stays")
        }
    if count > 1:
        found["train.accelerate"] = (str(accelerate), f"{count} processes that share the weights (FSDP2)")
    return found | {"placement": ("shared", "every role uses every GPU, by turns")}


def _as_adapter(settings: Settings) -> Settings:
    dropped = ("train.learning_rate", "service.drain_seconds")
    return {key: value for key, value in settings.items() if key not in dropped} | LORA


def _on_cpu(settings: Settings, model: Model) -> Settings:
    small = model.parameters is not None and model.parameters <= SMALL_MODEL
    base = settings if small or "train.lora.r" in settings else _as_adapter(settings)
    if small:
        base = {key: value for key, value in base.items() if not key.startswith("train.lora")} | SMALL
    gpu = ("generate.engine.gpu_memory_utilization", "generate.engine.tensor_parallel")
    found = {key: value for key, value in base.items() if key not in gpu} | CPU
    for key in ("prompts.per_round", "evaluate.prompts", "evaluate.audit_prompts"):
        if base[key][0] < (most := CPU.get(key, (128, ""))[0]):
            found[key] = base[key]
        elif key not in CPU:
            found[key] = (most, "each is answered by two policies, on a CPU")
    found["policy.dtype"] = ("float32", "exact on a CPU: a run that was disturbed ends as any other")
    return found


def _too_small(settings: Settings, there: tuple[Gpu, ...]) -> str:
    """What the plan of the memory says against it; empty where it confirms it."""
    with TemporaryDirectory(prefix="selfplay-init-") as scratch:
        config = _config(settings, Path(scratch), len(there))
        said = [finding.text for finding in gpus.too_small(config, there)]
        for i, moments in gpus.held(config, there).items() if not said else ():
            for moment, parts in moments.items():
                if sum(parts.values()) > (1 - BUFFERS) * there[i].total:
                    said.append(f"GPU {i} has no room for the buffers of kernels {moment}")
        return "; ".join(said)


def _require(settings: Settings, accelerate: str | None, there: Machine) -> None:
    """Raise InputError where the main memory is too small, which no number of a configuration changes much."""
    with TemporaryDirectory(prefix="selfplay-init-") as scratch:
        config = _config(settings, Path(scratch), len(there.gpus))
        for finding in machine.memory(config, Path(scratch)):
            if finding.level == "error":
                raise InputError(finding.text, "take a smaller model, or a machine with more main memory")


def for_disk(settings: Settings, processes: int) -> Settings:
    """The same with fewer policies kept, where the disk of the run has no room for more. What it still lacks, `check` says."""
    for last, rejected in KEPT:
        found = settings | {
            "retention.last": (
                last,
                "policies whose weights stay, beside the current one, its parent and the initial one",
            ),
            "retention.rejected_rounds": (rejected, "rounds after which the weights of a rejected one go"),
        }
        with TemporaryDirectory(prefix="selfplay-init-") as scratch:
            config = _config(found, Path(scratch), processes)
            if all(finding.level != "error" for finding in machine.disk(config, config.run_dir)):
                return found
    return found


def _config(settings: Settings, scratch: Path, count: int) -> Config:
    given = nested(settings)
    if "accelerate" in given["train"]:  # the file itself is written at the end
        path = scratch / "accelerate.yaml"
        path.write_text(FSDP2.format(processes=count), encoding="utf-8")
        given["train"]["accelerate"] = str(path)
    return Config.model_validate(given)


def _divisors(count: int) -> Iterator[int]:
    return (n for n in range(1, count + 1) if count % n == 0)
