"""Where the initial policy of a run comes from: a folder, the Hub, or an adapter that is merged with its base."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reward import hub
from selfplay.config.policy import PolicyConfig
from selfplay.errors import CheckpointError, InputError
from selfplay.storage import checkpoints
from selfplay.storage.beside import some
from selfplay.storage.checkpoints import Adapter, Checkpoint

if TYPE_CHECKING:
    import torch

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def initial_folder(model: str, revision: str | None, trust_remote_code: bool = False) -> Path:
    """The folder of a model; a Hub id is downloaded first, without what is no part of it. Raises InputError."""
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise InputError(f"policy.model {model}: no such folder", "relative paths start at the working directory")
    hub.bounded()
    from huggingface_hub import snapshot_download

    small = [f"*{suffix}" for suffix in checkpoints.SMALL if suffix != ".py" or trust_remote_code]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=small))
        return Path(snapshot_download(model, revision=revision, allow_patterns=checkpoints.to_fetch(folder)))
    except CheckpointError as error:
        raise InputError(f"policy.model {model!r}: {error}", error.hint) from None
    except Exception as error:  # network, authorisation and naming errors have no common base
        raise InputError(
            f"policy.model {model!r} is no folder here, and fetching it from the Hub failed: {error}"
        ) from None


def look(folder: Path) -> Checkpoint | Adapter:
    """What the folder of the initial policy holds; raises InputError."""
    try:
        found = checkpoints.look(folder)
        if isinstance(found, Checkpoint):
            _require_plain(folder)
    except CheckpointError as error:
        raise InputError(str(error), error.hint) from error
    return found


def _require_plain(folder: Path) -> None:
    checkpoints.require_plain(str(folder), json.loads((folder / "config.json").read_text(encoding="utf-8")))


def base_of(adapter: Adapter, trust_remote_code: bool) -> Path:
    """The folder of an adapter's base, which is downloaded where it is on the Hub. Raises InputError."""
    try:
        found = adapter.base_folder() or initial_folder(adapter.base, adapter.revision, trust_remote_code)
        checkpoints.read(found)
        _require_plain(found)
    except (CheckpointError, InputError) as error:
        hint = error.hint or f"put the base into a folder, and name it in {checkpoints.ADAPTER_CONFIG}"
        raise InputError(f"the adapter {adapter.folder} cannot be merged with its base: {error}", hint) from error
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Initial:
    """The initial policy of a run."""

    source: Path
    """The folder that the user named, or the one that a Hub id was downloaded to."""
    folder: Path
    """The source, or a folder that was made of it, with configuration, tokenizer and template; an adapter's has no weights yet."""
    adapter: Adapter | None
    said: str
    """What was made, for a person; empty where the source serves as it is."""


def prepare(policy: PolicyConfig, out: Path) -> Initial:
    """Find the initial policy. Where its folder is no plain checkpoint, `out` is made of it. Raises InputError.

    Of a checkpoint with other files beside it, `out` has links. For an adapter, it has what a merged model has beside its
    weights: tokenizer and chat template are the adapter's where it has a tokenizer, and all else is the base's.
    """
    source = initial_folder(policy.model, policy.revision, policy.trust_remote_code)
    found = look(source)
    if isinstance(found, Adapter):
        base = base_of(found, policy.trust_remote_code)
        out.mkdir(parents=True)
        shutil.copyfile(base / "config.json", out / "config.json")
        checkpoints.copy_companions(base, out)
        if any((source / name).is_file() for name in TOKENIZERS):
            checkpoints.copy_companions(source, out)
        return Initial(
            source=source, folder=out, adapter=found, said=f"{source} is an adapter, merged with its base {base}"
        )
    if not found.beside:
        return Initial(source=source, folder=source, adapter=None, said="")
    checkpoints.linked(found, out)
    said = f"{source}: {said_beside(found)}"
    return Initial(source=source, folder=out, adapter=None, said=said)


def merge(initial: Initial, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Put the weights of an adapter, merged with its base, into the folder that `prepare` made.

    Raises InputError where they do not fit, and TrainError where the base cannot be loaded.
    """
    from selfplay.models import adapters

    assert initial.adapter is not None
    base = base_of(initial.adapter, trust_remote_code)
    out = initial.folder.with_name(f"{initial.folder.name}.merged")
    adapters.merge(initial.adapter, base, initial.folder, out, dtype, trust_remote_code)
    shutil.rmtree(initial.folder)
    out.rename(initial.folder)


def said_beside(checkpoint: Checkpoint) -> str:
    """What lies beside a checkpoint and is not read, for a person."""
    by_reason: dict[str, list[str]] = {}
    for name, why in checkpoint.beside.items():
        by_reason.setdefault(why, []).append(name)
    return "not read: " + "; ".join(f"{some(names)} ({why})" for why, names in by_reason.items())
