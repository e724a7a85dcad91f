"""A model that several processes share (FSDP2), written as `weights.export` writes a whole one: the same files, to the byte.

Rank 0 writes, and gets the other processes' rows a block at a time. What it holds whole is one weight with an adapter, while the
two are merged, and one that transformers stores in another form than it computes with, as the experts of some models.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from selfplay.errors import TrainError
from selfplay.models import gathered, weights
from selfplay.models.streamed import StreamedFiles
from selfplay.storage.checkpoints import MASTERS

BASE = ".base_layer."  # In the names of what an adapter lies on.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weight:
    """A tensor of the plain model."""

    spec: Tensor
    """Its shape and dtype, without its numbers."""
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]
    """A call of all processes, which gives rank 0 its rows."""


def export(
    model: Any, start: Any, config_from: Path, initial: Path, out: Path | None, dtype: torch.dtype
) -> tuple[float, float] | None:
    """Write `model`, with its adapter merged, as a policy to `out`, with masters unless `dtype` is float32.

    A call of all processes; `out` is None on all but rank 0. start: the model that was trained from, in whatever dtype, on rank 0.
    Returns there what `weights.update_size` says of the two, and None on the others. Raises TrainError as that does.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    found = dict(_weights(plain))
    if out is None:
        for weight in found.values():
            for _ in weight.blocks():
                pass
        return None
    folders = {torch.float32: out} if dtype == torch.float32 else {torch.float32: out / MASTERS, dtype: out}
    specs = {name: weight.spec for name, weight in found.items()}
    stored = revert_weight_conversion(plain, dict(specs))  # as transformers names and cuts them in files
    renamed = {id(spec): name for name, spec in stored.items()}
    trained = {name for name, _ in start.named_parameters()}
    parameters = sum(specs[name].numel() for name in trained & specs.keys())
    update = _Update(dict(start.named_parameters()), found)
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(StreamedFiles(folder, revert_weight_conversion(plain, _cast(specs, kind)), parameters))
            for kind, folder in folders.items()
        ]
        for name, weight in found.items():
            own = renamed.get(id(weight.spec))
            full = torch.empty(weight.spec.shape, dtype=weight.spec.dtype) if own is None else None
            for row, block in weight.blocks():
                update.add(name, row, block)
                if full is not None:
                    full[row : row + len(block)] = block
                    continue
                for each in files:
                    each.write(str(own), row, block)
            if full is not None:
                for target, tensor in revert_weight_conversion(plain, {name: full}).items():
                    for each in files:
                        each.write(target, 0, tensor)
    for kind, folder in folders.items():
        weights.complete(config_from, initial, folder, kind)
    return update.size()


def adapter(model: Any) -> dict[str, Tensor]:
    """The weights of an adapter by their names in the whole model, on rank 0. A call of all processes."""
    return {name: gathered.whole(each) for name, each in model.state_dict().items() if _is_adapter(name)}


def _weights(plain: Any) -> Iterator[tuple[str, _Weight]]:
    """The tensors of the model below an adapter, in their order; of those that are tied, one."""
    layers = {name: each for name, each in plain.named_modules() if isinstance(each, BaseTunerLayer)}
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    tied = {name for name, same in plain.all_tied_weights_keys.items() if parameters.get(name) is parameters.get(same)}
    for key, tensor in plain.state_dict().items():
        if key in tied or _is_adapter(key):
            continue
        owner, _, own = key.partition(BASE)
        spec = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        blocks = partial(_merged, layers[owner]) if own == "weight" else partial(gathered.blocks, tensor)
        yield f"{owner}.{own}" if own else key, _Weight(spec=spec, blocks=blocks)


def _merged(layer: Any) -> Iterator[tuple[int, Tensor]]:
    """The weight of one layer with its adapter in it, as PEFT adds the two."""
    found = _whole(layer)
    if gathered.rank() == 0:
        found.merged_adapters = []
        found.merge()
        yield from gathered.blocks(found.get_base_layer().weight)


def _whole(module: Any) -> Any:
    """A copy of a module whose parameters rank 0 has whole. A call of all processes."""
    found = copy.copy(module)
    found._parameters = {
        name: None if each is None else nn.Parameter(gathered.whole(each), requires_grad=False)
        for name, each in module._parameters.items()
    }
    found._modules = {name: _whole(each) for name, each in module._modules.items()}
    return found


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _cast(specs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: spec.to(dtype) if spec.is_floating_point() else spec for name, spec in specs.items()}


class _Update:
    """What `weights.update_size` says, block by block."""

    def __init__(self, start: dict[str, Tensor], final: dict[str, _Weight]) -> None:
        for name, one in start.items():
            if name not in final or final[name].spec.shape != one.shape:
                raise TrainError("input", f"the trained model has no {name} of shape {tuple(one.shape)}")
        self._start = start
        self._changed = self._elements = 0
        self._delta_square = self._start_square = 0.0

    @torch.no_grad()
    def add(self, name: str, row: int, block: Tensor) -> None:
        if name not in self._start:  # a buffer
            return
        before = self._start[name].detach()
        a = (before if before.dim() else before.reshape(1))[row : row + len(block)].float()
        b = block.float()
        self._changed += int((a != b).sum())
        self._elements += a.numel()
        self._delta_square += float((b - a).norm()) ** 2
        self._start_square += float(a.norm()) ** 2

    def size(self) -> tuple[float, float]:
        return self._changed / self._elements, (self._delta_square / self._start_square) ** 0.5
