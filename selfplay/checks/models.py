"""Looks at the models: what their folders hold, how long a text they read, and whether they load.

Whether they load is found out by a process of its own (`checks/loading.py`), because it imports PyTorch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from selfplay.checks import hub, sizes
from selfplay.checks.finding import Finding
from selfplay.checks.prompts import sample
from selfplay.config import Config
from selfplay.errors import CheckpointError
from selfplay.models.initial import said_beside
from selfplay.processes.children import inherited_environment
from selfplay.rounds.requirements import num_labels
from selfplay.storage import checkpoints
from selfplay.storage.beside import without_weights
from selfplay.storage.checkpoints import Adapter, Checkpoint

SECONDS = 300.0  # for the imports of the process that loads; a model itself takes a moment


def named(config: Config) -> dict[str, str]:
    """All models that a configuration names: key → folder or Hub id."""
    rewards = config.all_sources()
    models = {"policy.model": config.policy.model, **{f"{key}.model": source.model for key, source in rewards.items()}}
    return {key: model for key, model in models.items() if model is not None}


def folders(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether each model is there with all its files, a tokenizer and a chat template among them."""
    rewards = config.all_sources()
    for key, model in named(config).items():
        source = rewards.get(key.removesuffix(".model"))
        labels = 1 if source and not source.heads and not source.trust_remote_code else None
        yield from whole(key, model, config.policy.revision if source is None else None, labels)


def whole(key: str, model: str, revision: str | None = None, labels: int | None = None) -> Iterator[Finding]:
    """Whether a model, a folder or one on the Hub, has all its files; `labels`: how many it has to have."""
    if Path(model).is_dir():
        yield from _in_folder(key, Path(model), labels)
    else:
        yield _on_the_hub(key, model, revision)


def _in_folder(key: str, path: Path, labels: int | None) -> Iterator[Finding]:
    try:
        found = checkpoints.look(path) if key == "policy.model" else checkpoints.unmixed(path)
        base = found.base_folder() if isinstance(found, Adapter) else None
        settings, size = sizes.settings(str(path)), sizes.parameters(str(path)) or 0
    except CheckpointError as error:
        yield Finding.error(key, f"{error}; {error.hint}")
        return
    if labels is not None and (n := num_labels(path)) != labels:
        yield Finding.error(key, f"{path} has {n} labels; a reward model has 1")
        return
    lacks = [_lacks(folder) for folder in (path, base) if folder is not None]  # a base may have what its adapter lacks
    if all(lacks) and (base is not None or isinstance(found, Checkpoint)):  # or a base's on the Hub
        yield Finding.error(key, f"{path} has no {lacks[0]}")
        return
    named = settings.get("architectures") or [settings.get("model_type") or "?"]
    made = f", an adapter that is merged with {found.base}" if isinstance(found, Adapter) else ""
    yield Finding.ok(key, f"{path}: {named[0]}, {size / 1e6:,.1f} M parameters, all files are there{made}")
    if isinstance(found, Checkpoint) and found.beside:
        yield Finding.warning(key, f"{path}: {said_beside(found)}; remove what is of no use")


def _lacks(model: Path) -> str | None:
    """What a model's folder lacks besides its weights; None where it has a tokenizer and a chat template."""
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


def _on_the_hub(key: str, model: str, revision: str | None) -> Finding:
    if not sizes.on_the_hub(model):
        return Finding.error(key, f"{model}: no such folder")
    told = hub.ask(model, revision)
    if told.absent:
        hint = "correct the name, or export HF_TOKEN with a token that may read it"
        return Finding.error(key, f"{model}: the Hub has no such model for us ({told.absent}); {hint}")
    if told.away:
        copy = f"a copy is in {told.cached}" if told.cached else "there is no copy in the cache"
        return Finding.warning(key, f"{model}: the Hub could not be asked ({told.away}); {copy}")
    adapter = key == "policy.model" and checkpoints.ADAPTER in told.files
    if not checkpoints.weights_on_hub(told.files) and not adapter:
        why, hint = without_weights(model, [name for name in told.files if "/" not in name])
        return Finding.error(key, f"{why}; {hint}")
    if key == "policy.model":
        try:
            checkpoints.require_plain(model, told.config)
        except CheckpointError as error:
            return Finding.error(key, f"{error}; {error.hint}")
    size = f", {told.parameters / 1e6:,.1f} M parameters" if told.parameters else ""
    return Finding.ok(key, f"{model} is on the Hub, with safetensors{size}")


def context(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the policy can read as many tokens as the engine and the trainer will give it."""
    settings = sizes.settings(config.policy.model, config.policy.revision)
    text = settings.get("text_config") or settings
    limit = text.get("max_position_embeddings") or text.get("n_positions")  # as GPT-2 calls it
    if not isinstance(limit, int):
        return
    asked = {
        "prompts.max_tokens + generate.max_tokens + 1": config.prompts.max_tokens + config.generate.max_tokens + 1,
        "generate.engine.max_model_len": config.generate.engine.max_model_len or 0,
        "train.max_length": config.train.max_length,
    }
    if config.longest_answer > config.generate.max_tokens:
        needed = config.prompts.max_tokens + config.longest_answer + 1
        asked["prompts.max_tokens + the largest max_tokens of evaluate.suites + 1"] = needed
    over = [f"{name} is {length}" for name, length in asked.items() if length > limit]
    said = f"the policy reads up to {limit} tokens" + (f", but {', '.join(over)}" if over else "")
    yield Finding("error" if over else "ok", "context", said)


def loads(config: Config) -> list[Finding]:
    """A finding for each model that is a folder: does it load? It takes some seconds, since PyTorch is imported."""
    rewards = config.all_sources()
    prompts = sample(config)
    asked = []
    for key, model in named(config).items():
        source = rewards.get(key.removesuffix(".model"))
        owner = config.policy if source is None else source
        if _is_here(Path(model)):
            asked.append(
                {
                    "key": key,
                    "model": model,
                    "policy": source is None,
                    "trust_remote_code": owner.trust_remote_code,
                    "kwargs": owner.chat_template_kwargs,
                    "dated": owner.template_date is not None,
                    "prompts": prompts,
                    "prompt_tokens": config.prompts.max_tokens,
                    "answer_tokens": config.longest_answer,
                    "max_tokens": None,
                    "max_missing": config.reward.max_missing,
                    "thinking": config.policy.thinking and config.policy.thinking.model_dump(),
                }
            )
    if not asked:
        return []
    root = str(Path(__file__).resolve().parents[2])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "selfplay.checks.loading"], input=json.dumps(asked),
            capture_output=True, text=True, timeout=SECONDS,
            env=inherited_environment() | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        late = f"they were not built within {SECONDS:.0f} s: whether they load, and what templates make of the prompts, is not known"
        return [Finding.warning("models", f"{late}; try again when this machine has less to do")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding.error("models", f"the process that loads them ended: {last}")]
    answers = json.loads(done.stdout.splitlines()[-1])
    return [Finding(level, about, text) for said in answers for level, about, text in said]


def _is_here(folder: Path) -> bool:
    """Whether all files of a model are on this machine, an adapter's base among them; what is wrong with them is said elsewhere."""
    try:
        found = checkpoints.look(folder)
        return isinstance(found, Checkpoint) or found.base_folder() is not None
    except CheckpointError:
        return False
