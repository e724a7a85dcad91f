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
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo

import httpx
import yaml

from reward.client import RewardClient, RewardRefused, RewardUnavailable
from selfplay import gate, policies, trackers
from selfplay.config import Config
from selfplay.daemon import next_start
from selfplay.errors import SelfplayError
from selfplay.run import load_function

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    about: str
    level: Literal["ok", "warning", "error"]
    text: str


def check(config: Config, run_dir: Path) -> list[Finding]:
    """Everything that can be known before a round: models and their context, batches, prompts, reward, schedule, tracker,
    functions, disk, memory, GPUs, port."""
    looks: list[tuple[str, Callable[[Config, Path], Iterator[Finding]]]] = [
        ("models", _models), ("context", _context), ("training", _training), ("prompts", _prompts), ("reward", _reward),
        ("schedule", _schedule), ("track", _track),
        ("functions", _functions), ("disk", _disk), ("memory", _memory), ("gpu", _gpu), ("port", _port),
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
    rewards = config.reward_sources() | config.judge_sources()
    models = {"policy.model": config.policy.model, **{f"{key}.model": source.model for key, source in rewards.items()}}
    for key, model in models.items():
        source = rewards.get(key.removesuffix(".model"))
        labels = 1 if source and not source.heads and not source.trust_remote_code else None
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
        if lack := _lacks(path):
            yield Finding(about=key, level="error", text=f"{model} has no {lack}")
            continue
        yield Finding(
            about=key,
            level="ok",
            text=f"{model}: {settings.get('architectures', ['?'])[0]}, {elements / 1e6:,.1f} M parameters, whole",
        )


def _lacks(model: Path) -> str | None:
    """What a folder needs beside its weights to be given conversations, and lacks."""
    settings = model / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if not known and not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return "tokenizer"
    if (
        known.get("chat_template")
        or (model / "chat_template.jinja").is_file()
        or (model / "chat_template.json").is_file()
    ):
        return None
    return "chat template: use an instruct model, or add chat_template.jinja"


def _context(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the policy reads as many tokens as engine and trainer will give it."""
    path = Path(config.policy.model) / "config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    limit = (settings.get("text_config") or settings).get("max_position_embeddings")
    if not isinstance(limit, int):
        return
    asked = {
        "prompts.max_tokens + generate.max_tokens + 1": config.prompts.max_tokens + config.generate.max_tokens + 1,
        "generate.engine.max_model_len": config.generate.engine.max_model_len or 0,
        "train.max_length": config.train.max_length,
    }
    over = [f"{name} is {length}" for name, length in asked.items() if length > limit]
    said = f"the policy reads up to {limit} tokens" + (f", but {', '.join(over)}" if over else "")
    yield Finding(about="context", level="error" if over else "ok", text=said)


def _training(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the batch can be shared among the trainer's processes."""
    settings = config.train
    if settings.accelerate is None:
        return
    if not settings.accelerate.is_file():
        yield Finding(about="train.accelerate", level="error", text=f"{settings.accelerate}: no such file")
        return
    found = yaml.safe_load(settings.accelerate.read_text(encoding="utf-8"))
    processes = int(found.get("num_processes", 1)) if isinstance(found, dict) else 1
    together = settings.micro_batch_pairs * processes
    said = f"{settings.batch_pairs} pairs a step on {processes} processes, {settings.micro_batch_pairs} at a time each"
    if settings.batch_pairs % together:
        yield Finding(about="train.batch_pairs", level="error", text=f"{said}: not a multiple of {together}")
    else:
        yield Finding(about="training", level="ok", text=said)


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
    sources = config.reward_sources() | config.judge_sources()
    for source, url in [(s, u) for s in sources.values() for u in s.url]:
        key = os.environ.get(source.api_key_env) if source.api_key_env else None
        try:
            with RewardClient(
                url, dialect=source.dialect, tokenizer=source.tokenizer, api_key=key, deadline=10.0
            ) as client:
                health = client.health()
            asked = (
                "is not asked: its format has no such question"
                if source.dialect == "openrlhf"
                else f"serves {health.model}"
            )
            yield Finding(about="reward", level="ok", text=f"{url} {asked}")
        except (RewardUnavailable, RewardRefused, ValueError) as error:
            yield Finding(about="reward", level="error", text=f"{url} does not answer: {error}")
    if config.evaluate.judge is None:
        yield Finding(
            about="gate",
            level="warning",
            text="gate not independent: the reward that trains also judges (evaluate.judge)",
        )


def _schedule(config: Config, run_dir: Path) -> Iterator[Finding]:
    settings, now = config.schedule, datetime.now(UTC)
    if settings.mode == "continuous":
        yield Finding(about="schedule", level="ok", text="a round follows a round")
        return
    first = next_start(settings, None, now, now, 0.0).astimezone(ZoneInfo(settings.time_zone))
    yield Finding(
        about="schedule", level="ok", text=f"{settings.mode}: if it began now, first at {first:%Y-%m-%d %H:%M %Z}"
    )


def _track(config: Config, run_dir: Path) -> Iterator[Finding]:
    trackers.require(config.track)
    yield Finding(about="track", level="ok", text=config.track)


def _functions(config: Config, run_dir: Path) -> Iterator[Finding]:
    rewriter = None if config.evolve.rewriter == "policy" else config.evolve.rewriter
    for key, name in (("evaluate.gold", config.evaluate.gold), ("evolve.rewriter", rewriter)):
        if name is not None:
            load_function(key, name)
            yield Finding(about=key, level="ok", text=f"{name} can be imported")


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
