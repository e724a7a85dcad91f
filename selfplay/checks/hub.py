"""What the Hub says about a model, without its weights: its files, the number of its parameters, and its config.json; and
which configurations and splits a dataset has.

A machine without a network asks the cache instead, where an earlier start may have left the model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reward import hub

SECONDS = 10.0  # for an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is known about a model on the Hub."""

    files: tuple[str, ...] = ()
    parameters: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    cached: Path | None = None
    """The folder of a copy in the cache, which is all that was looked at where the Hub did not answer."""
    away: str = ""
    """Why the Hub could not be asked; empty where it answered."""
    absent: str = ""
    """Why it has no such model for us: the name is wrong, or its access needs a token."""


@functools.cache
def ask(model: str, revision: str | None = None) -> Told:
    """Ask once about a model `owner/name`. Whatever goes wrong is part of the answer."""
    hub.bounded()
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(model, revision=revision, timeout=SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        return Told(absent=type(error).__name__)
    except (
        Exception
    ) as error:  # no network, a proxy, offline mode, a server's fault: errors of the HTTP library without a common base
        folder = _in_the_cache(model, revision)
        return Told(away=type(error).__name__, cached=folder, config=_read(folder))
    total = info.safetensors.total if info.safetensors is not None else None
    return Told(
        files=tuple(file.rfilename for file in info.siblings or ()),
        parameters=None if total is None else int(total),
        config=_config(model, revision),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What is known about a dataset on the Hub."""

    configs: tuple[dict[str, Any], ...] = ()
    """The configurations that its card names, as they stand there."""
    splits: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)
    """Configuration → split → number of its rows, as far as the card tells."""
    away: str = ""
    absent: str = ""
    """As of a model."""


@functools.cache
def dataset(name: str) -> Dataset:
    """Ask once about a dataset. Whatever goes wrong is part of the answer."""
    hub.bounded()
    import huggingface_hub
    from huggingface_hub import errors

    try:
        card = huggingface_hub.HfApi().dataset_info(name, timeout=SECONDS).card_data
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        return Dataset(absent=type(error).__name__)
    except Exception as error:  # as for a model
        return Dataset(away=type(error).__name__)
    told = card.to_dict() if card is not None else {}  # type: ignore[no-untyped-call]
    configs, about = (_objects(told.get(key)) for key in ("configs", "dataset_info"))
    splits = {
        str(one.get("config_name", "default")): {
            str(split.get("name")): split.get("num_examples") for split in _objects(one.get("splits"))
        }
        for one in about
    }
    return Dataset(configs=tuple(configs), splits=splits)


def _objects(value: Any) -> list[dict[str, Any]]:
    """A list of objects, or one that stands alone, of a card that anybody may write."""
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]


def _config(model: str, revision: str | None) -> Mapping[str, Any]:
    """Its config.json, which a round would fetch too; empty where that is refused, as for a gated model without a token."""
    hub.bounded()
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # they are drawn with characters that the terminal does not get
    try:
        path = huggingface_hub.hf_hub_download(model, "config.json", revision=revision, etag_timeout=SECONDS)
    except Exception:  # as above: then the shape is only a guess from the number of parameters
        return {}
    return _read(Path(path).parent)


def _in_the_cache(model: str, revision: str | None) -> Path | None:
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _read(folder: Path | None) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
