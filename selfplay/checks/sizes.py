"""How large a model is, and of which shape: from its folder, or from what the Hub says about it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfplay.checks import hub
from selfplay.errors import CheckpointError
from selfplay.planning import shapes
from selfplay.planning.shapes import Shape
from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import Adapter


def parameters(model: str | None, revision: str | None = None) -> int | None:
    """The number of parameters of a model; None where it cannot be told. Raises CheckpointError for a damaged folder."""
    if model is None:
        return None
    if Path(model).is_dir():
        found = checkpoints.look(Path(model))
        if isinstance(found, Adapter):  # merged, it is as large as its base
            return parameters(*_base(found))
        return sum(math.prod(shape) for _, shape in found.tensors.values())
    if not on_the_hub(model):
        return None
    told = hub.ask(model, revision)
    if told.cached is not None:
        try:
            return sum(math.prod(shape) for _, shape in checkpoints.tensors(told.cached).values())
        except CheckpointError:  # the cache has a part of it, or an adapter
            return told.parameters
    return told.parameters


def shape(model: str | None, revision: str | None = None) -> Shape | None:
    """The shape of a model; None where its size is not known. Without its config it is that of a usual model of its size."""
    count = parameters(model, revision)
    if count is None or model is None:
        return None
    return shapes.from_config(settings(model, revision), count) or shapes.usual(count)


def settings(model: str, revision: str | None = None) -> Mapping[str, Any]:
    """The config.json of a model, or of an adapter's base; empty where it cannot be had. Raises CheckpointError."""
    path = Path(model) / "config.json"
    if (Path(model) / checkpoints.ADAPTER_CONFIG).is_file() and isinstance(
        found := checkpoints.look(Path(model)), Adapter
    ):
        return settings(*_base(found))
    if path.is_file():
        told: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return told
    return hub.ask(model, revision).config if on_the_hub(model) else {}


def _base(adapter: Adapter) -> tuple[str, str | None]:
    """The model of an adapter's base, and its revision on the Hub. Raises CheckpointError."""
    folder = adapter.base_folder()
    if folder is None:
        return adapter.base, adapter.revision
    checkpoints.read(folder)  # a base that is an adapter too has no end
    return str(folder), None


def on_the_hub(model: str) -> bool:
    """Whether a name has the form `owner/name` of the Hub."""
    return model.count("/") == 1 and not model.startswith((".", "/"))
