"""Checkpoints that a process keeps in memory from one order to the next, so that it does not read again what it has.

What is kept is known by its files, as `storage/hashes.py` knows them: by device, inode, size and time of change. Before an
order the controller checks the files of its policies against the hashes in their manifests. Where they are the files that
were read or written here, what is kept is what they hold.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from torch import nn

from selfplay.models import weights
from selfplay.storage import hashes

logger = logging.getLogger(__name__)

READ = ("*.safetensors", "config.json", "generation_config.json", "*.py")  # the files that a model is loaded from
SPARE = 2  # models of its size for which the host must have room before one is kept

_Files = tuple[tuple[str, hashes.Identity], ...]


class Kept:
    """Float32 models on the CPU, just as `weights.load` gives them. Nobody trains them or changes how they work.

    keeps: False for a process that reads every model anew, such as one of several that spread a model among themselves.
    """

    def __init__(self, keeps: bool = True) -> None:
        self._keeps = keeps
        self._models: dict[_Files, Any] = {}

    def own(self, folder: Path, trust_remote_code: bool = False) -> Any:
        """The model of a checkpoint for somebody who changes it. Raises TrainError as `weights.load` does."""
        model = self._get(folder, trust_remote_code)
        return _named(copy.deepcopy(model), folder) if self._has(folder) else model

    def shared(self, folder: Path, trust_remote_code: bool = False) -> Any:
        """The model of a checkpoint for somebody who leaves its weights alone; its modules are his. Raises as `own`."""
        model = self._get(folder, trust_remote_code)
        return _named(_over(model), folder) if self._has(folder) else model

    def beside(self, folder: Path, trained: Any) -> Any:
        """A model as that of a checkpoint, which has the weights of `trained`; None where nothing is kept of it."""
        if not self._has(folder):
            return None
        model = copy.deepcopy(self._get(folder, False))
        model.load_state_dict(trained.state_dict())
        return model

    def put(self, folder: Path, model: Any) -> None:
        """Keep the model that was written to a checkpoint, where the host has the memory for it. It is given away."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if self._keeps and psutil.virtual_memory().available > SPARE * size:
            self._models[_files(folder)] = model

    def only(self, folders: Iterable[Path]) -> None:
        """Forget all models but those of these checkpoints."""
        wanted = {_files(folder) for folder in folders if folder.is_dir()}
        self._models = {files: model for files, model in self._models.items() if files in wanted}

    def _has(self, folder: Path) -> bool:
        return _files(folder) in self._models

    def _get(self, folder: Path, trust_remote_code: bool) -> Any:
        found = self._models.get(_files(folder))
        if found is None:
            found = weights.load(folder, trust_remote_code=trust_remote_code)
            self.put(folder, found)
        return found


def _files(folder: Path) -> _Files:
    """What tells one checkpoint from another, and from itself after a change."""
    found = sorted({path for pattern in READ for path in folder.glob(pattern)})
    return tuple((path.name, hashes.identity(path)) for path in found)


def _over(model: Any) -> Any:
    """A copy of the modules over the same weights. Moved to another device, the copy leaves the original where it is."""
    tensors = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, tensors)


def _named(model: Any, folder: Path) -> Any:
    """The model as if it had been read from this folder: an adapter writes down where its base came from."""
    model.config.name_or_path = model.name_or_path = str(folder)
    return model
