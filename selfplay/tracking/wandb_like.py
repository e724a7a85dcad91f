"""What Weights & Biases and trackio have in common: trackio has the interface of W&B."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from selfplay.config import Config
from selfplay.visible import visible


class WandbLike:
    """A run of `module`. Both axes are metrics of their own, so that the others can be plotted against them."""

    def __init__(self, module: Any, config: Config, **names: Any) -> None:
        self._module = module
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints, and the terminal belongs to the display
            module.init(project="selfplay", resume="allow", config=_shown(config.model_dump(mode="json")), **names)

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        self._module.log({f"{axis}/{name}": value for name, value in values.items()} | {f"{axis}/step": step})

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._module.finish()


def _shown(value: Any) -> Any:
    """The same JSON value, with texts that a page can show."""
    if isinstance(value, dict):
        return {_shown(name): _shown(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value
