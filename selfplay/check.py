"""`selfplay check`: would these rounds run on this machine? Looks, and starts nothing heavy."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from selfplay import gate, policies
from selfplay.config import Config
from selfplay.errors import SelfplayError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    about: str
    level: Literal["ok", "warning", "error"]
    text: str


def check(config: Config, run_dir: Path) -> list[Finding]:
    """Everything that can be known before a round: models, prompts, reward, disk, memory, GPUs, port."""
    looks: list[tuple[str, Callable[[Config, Path], Iterator[Finding]]]] = [
        ("models", _models), ("prompts", _prompts), ("reward", _reward), ("disk", _disk), ("memory", _memory),
        ("gpu", _gpu), ("port", _port),
    ]  # fmt: skip
    found: list[Finding] = []
    for name, look in looks:
        try:
            found += look(config, run_dir)
        except (SelfplayError, OSError, ValueError) as error:
            found.append(Finding(about=name, level="error", text=str(error)))
        except Exception as error:  # the boundary: one look that fails must not hide the others
            found.append(Finding(about=name, level="error", text=f"{type(error).__name__}: {error}"))
    return found


def _models(config: Config, run_dir: Path) -> Iterator[Finding]:
    judge = config.evaluate.judge.model if config.evaluate.judge else None
    for key, model, labels in (
        ("policy.model", config.policy.model, None), ("reward.model", config.reward.model, 1), ("evaluate.judge.model", judge, 1),
    ):  # fmt: skip
        if model is None:
            continue
        path = Path(model)
        if not path.is_dir():
            yield _on_the_hub(key, model)
            continue
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        n = settings.get("num_labels", len(settings.get("id2label", {})) or None)
        if labels is not None and n not in (None, labels):
            yield Finding(about=key, level="error", text=f"{model} has {n} labels; a reward model has 1")
            continue
        elements = sum(math.prod(shape) for _, shape in policies.tensors(path).values())
        yield Finding(
            about=key,
            level="ok",
            text=f"{model}: {settings.get('architectures', ['?'])[0]}, {elements / 1e6:,.1f} M parameters, whole",
        )


def _on_the_hub(key: str, model: str) -> Finding:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if model.count("/") != 1 or model.startswith((".", "/")):
        return Finding(about=key, level="error", text=f"{model}: no such folder")
    try:
        files = [s.rfilename for s in HfApi().model_info(model, timeout=10).siblings or []]
    except (HfHubHTTPError, OSError, httpx.HTTPError) as error:
        reason = type(error).__name__
        return Finding(
            about=key,
            level="warning",
            text=f"{model}: the Hub could not be asked ({reason}); a copy in the cache may do",
        )
    if not any(name.endswith(".safetensors") for name in files):
        return Finding(about=key, level="error", text=f"{model} has no safetensors on the Hub")
    return Finding(about=key, level="ok", text=f"{model}: on the Hub, with safetensors")


def _prompts(config: Config, run_dir: Path) -> Iterator[Finding]:
    for key, source in (("prompts.source", config.prompts.source), ("prompts.heldout", config.prompts.heldout)):
        if source is None:
            continue
        path = Path(source)
        if path.is_file():
            yield Finding(about=key, level="ok", text=f"{source}: {path.stat().st_size / 1e6:.1f} MB")
        elif path.suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/")):
            yield Finding(about=key, level="error", text=f"{source}: no such file")
        else:
            yield Finding(about=key, level="ok", text=f"{source}: taken for a Hub dataset, loaded at the start")


def _reward(config: Config, run_dir: Path) -> Iterator[Finding]:
    judge = config.evaluate.judge.url if config.evaluate.judge else []
    for url in [*config.reward.url, *judge]:
        try:
            health = httpx.get(f"{url.rstrip('/')}/healthz", timeout=10).raise_for_status().json()
            yield Finding(about="reward", level="ok", text=f"{url} serves {health.get('model', '?')}")
        except (httpx.HTTPError, ValueError) as error:
            yield Finding(about="reward", level="error", text=f"{url}/healthz does not answer: {error}")
    if config.evaluate.judge is None:
        yield Finding(
            about="gate",
            level="warning",
            text="gate not independent: the reward that trains also judges (evaluate.judge)",
        )


def parameters(config: Config) -> int | None:
    """Parameters of the initial policy, where it is a folder."""
    path = Path(config.policy.model)
    return sum(math.prod(shape) for _, shape in policies.tensors(path).values()) if path.is_dir() else None


def policy_bytes(config: Config, elements: int) -> int:
    """Bytes of an exported policy: serving precision, and fp32 masters beside it unless that is fp32."""
    served = DTYPE_BYTES[config.policy.dtype]
    return elements * (served + (4 if served != 4 else 0))


def _disk(config: Config, run_dir: Path) -> Iterator[Finding]:
    where = next(p for p in [run_dir, *run_dir.resolve().parents] if p.exists())
    free = shutil.disk_usage(where).free
    elements = parameters(config)
    if elements is None:
        yield Finding(
            about="disk",
            level="warning",
            text=f"{free / GIB:.1f} GiB free in {where}; the policy's size is not known yet",
        )
        return
    kept = config.retention.last + 3
    trainer = 0 if config.train.lora else 2 * 12 * elements
    need = kept * policy_bytes(config, elements) + trainer
    level: Literal["ok", "error"] = "ok" if free > need else "error"
    yield Finding(
        about="disk",
        level=level,
        text=f"{free / GIB:.1f} GiB free in {where}, {need / GIB:.2f} GiB needed: {kept} policies and two saves of the trainer",
    )


def _memory(config: Config, run_dir: Path) -> Iterator[Finding]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    elements = parameters(config)
    if elements is None or shutil.which("nvidia-smi"):
        yield Finding(about="memory", level="ok", text=f"{total / GIB:.0f} GiB of host memory")
        return
    # On a CPU all share it: masters, gradient, two moments and the reference; the engine; the reward model; the libraries.
    need = (
        elements * (4 * 5 + DTYPE_BYTES[config.policy.dtype]) + config.generate.engine.cpu_kv_cache_gib * GIB + 3 * GIB
    )
    level: Literal["ok", "error"] = "ok" if total > need else "error"
    yield Finding(
        about="memory", level=level, text=f"{total / GIB:.0f} GiB of host memory, about {need / GIB:.1f} GiB needed"
    )


def _gpu(config: Config, run_dir: Path) -> Iterator[Finding]:
    if not shutil.which("nvidia-smi"):
        wanted = [
            *(config.placement.generator or []),
            *(config.placement.trainer or []),
            *(config.placement.reward or []),
        ]
        if wanted or config.placement.colocated:
            yield Finding(about="gpu", level="error", text="placement names GPUs, but nvidia-smi is not there")
        else:
            yield Finding(about="gpu", level="ok", text="none: everything runs on the CPU")
        return
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        yield Finding(
            about="gpu", level="error", text=f"nvidia-smi failed: {answer.stdout.strip() or answer.stderr.strip()}"
        )
        return
    there = {int(row.split(",")[0]): row for row in answer.stdout.splitlines() if row.strip()}
    for role in ("generator", "trainer", "reward"):
        for index in getattr(config.placement, role) or []:
            if index not in there:
                yield Finding(
                    about="gpu", level="error", text=f"placement.{role} names GPU {index}; there are {sorted(there)}"
                )
    for row in there.values():
        index, name, whole, free = (part.strip() for part in row.split(","))
        level: Literal["ok", "warning"] = "ok" if float(free) > 0.9 * float(whole) else "warning"
        yield Finding(
            about="gpu",
            level=level,
            text=f"GPU {index} {name}: {float(free) / 1024:.1f} of {float(whole) / 1024:.1f} GiB free",
        )


def _port(config: Config, run_dir: Path) -> Iterator[Finding]:
    with socket.socket() as probe:
        try:
            probe.bind((config.service.host, config.service.port))
        except OSError as error:
            yield Finding(
                about="port",
                level="warning",
                text=f"{config.service.host}:{config.service.port} cannot be taken: {error.strerror} (is the service running?)",
            )
        else:
            yield Finding(about="port", level="ok", text=f"{config.service.host}:{config.service.port} is free")


def plan(config: Config) -> list[tuple[str, str]]:
    """What a round will do: (what, how much). Upper bounds where lengths decide."""
    prompts, k = config.prompts.per_round, config.generate.candidates
    kept = max(1, int(config.pairs.keep * prompts))
    trained = kept if config.depth.method == "none" else round(kept * config.depth.pairs_per_prompt)
    steps = math.ceil(trained / config.train.batch_pairs) * config.train.epochs
    answers = 2 * config.evaluate.prompts
    tokens = prompts * k * config.generate.max_tokens
    rows = [
        ("prompts", f"{prompts}, {k} candidates each: {prompts * k:,}"),
        ("tokens", f"up to {tokens:,} sampled ({config.generate.max_tokens} a response)"),
        (
            "pairs",
            f"up to {prompts} base pairs, {kept} kept, {trained} trained on in {steps} steps of {config.train.batch_pairs}",
        ),
        ("evaluation", f"{answers} answers to {config.evaluate.prompts} held-out prompts"),
    ]
    elements = parameters(config)
    artifacts = tokens * 16
    if elements is not None:
        rows.append(
            ("disk", f"up to {(artifacts + policy_bytes(config, elements)) / GIB:.2f} GiB a round, retention aside")
        )
    rule = config.evaluate.gate
    chances = " · ".join(
        f"{p:.2f} → {gate.power(config.evaluate.prompts, p, rule):.0%}" for p in (0.47, 0.5, 0.53, 0.56, 0.6)
    )
    rows.append(("gate", f"chance to pass by true win rate, at {config.evaluate.prompts} prompts: {chances}"))
    return rows
