"""What is done inside vLLM's worker, where the weights are. vLLM imports this module by its name (`worker_extension_cls`).

It uses torch and what vLLM hands to it, and does not import vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from selfplay.storage import checkpoints


class WorkerOrders:
    """Methods that vLLM adds to its worker: `collective_rpc` calls them by their names."""

    model_runner: Any
    parallel_config: Any

    def renew_packed_weights(self) -> None:
        """Repack weights that kernels of a CPU hold in a layout of their own, where a reload has left the old ones or plain ones.

        The output layer multiplies by a repacked copy of its weight. vLLM 0.32 renews the copy when the checkpoint names the
        layer. A tied output layer is not named there, and would go on with the old weights. Experts of a mixture are packed
        when they are loaded first, and a reload puts plain weights in their place.
        """
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                kernel.fused_experts.process_weights_after_loading(module)

    def forget_weights(self) -> bool:
        """Set this worker's share of the weights to 0. Where kernels keep copies of them, do nothing and return False."""
        model = self.model_runner.get_model()
        if any(hasattr(module, "cpu_linear") for module in model.modules()):
            return False
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.zero_()
        return True

    def compare_weights(self, path: str) -> dict[str, Any]:
        """Largest |engine − checkpoint| over all parameters, in the serving dtype, and how many were compared.

        Where a kernel keeps a repacked copy of a parameter, the copy is read as well. `supported` is False where parameters
        cannot be matched one to one with the checkpoint: with several GPUs, with quantization, or where a model renames
        tensors.
        """
        if self.parallel_config.world_size > 1:
            return _unsupported("the weights are split over several GPUs")
        model = self.model_runner.get_model()
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        checkpoint = checkpoints.read(Path(path))
        files = [safe_open(checkpoint.folder / name, framework="pt") for name in checkpoint.weights]
        where = {name: file for file in files for name in file.keys()}
        left, worst, compared = set(where), 0.0, 0
        # A tied parameter comes under both of its names: each layer may hold a copy of its own.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names = _sources(name, packed, where)
            if not names and name == "lm_head.weight":
                names = _sources("model.embed_tokens.weight", packed, where)
            if not names:
                return _unsupported(f"the checkpoint has nothing under the name of {name}")
            left.difference_update(names)
            wanted = torch.cat([where[n].get_tensor(n) for n in names]).to(parameter.dtype)
            module = model.get_submodule(name.rpartition(".")[0])
            for held in _held(module, name, parameter):
                # The vocabulary is padded in the engine.
                if held.shape[0] < wanted.shape[0] or held.shape[1:] != wanted.shape[1:]:
                    return _unsupported(f"{name} has shape {tuple(held.shape)}, not {tuple(wanted.shape)}")
                # In main memory: the accelerator's is full.
                difference = (held[: wanted.shape[0]].cpu().float() - wanted.float()).abs().max().item()
                worst = max(worst, difference if math.isfinite(difference) else math.inf)
            compared += wanted.numel()
        # A tied output layer may be stored twice; rotary frequencies are computed.
        left = {n for n in left if n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")}
        if left:
            return _unsupported(f"no parameter of the engine takes {min(left)}")
        if not math.isfinite(worst):
            return _unsupported("a weight is not finite")
        return {"supported": True, "compared": compared, "max_abs_diff": worst, "why": ""}


def _unsupported(why: str) -> dict[str, Any]:
    return {"supported": False, "compared": 0, "max_abs_diff": None, "why": why}


def _sources(name: str, packed: dict[str, list[str]], where: dict[str, Any]) -> list[str]:
    """Names of the checkpoint's tensors that make up the engine's parameter `name`, in the order of its rows.

    Empty when not all of them are there.
    """
    if name in where:
        return [name]
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    parts = [f"{parent}.{part}.{leaf}" for part in packed.get(last, [])]
    return parts if parts and all(part in where for part in parts) else []


def _held(module: Any, name: str, parameter: Any) -> Iterator[Any]:
    """What the engine holds of a parameter: the parameter, and the copy inside a CPU kernel.

    The copy is read by multiplying the unit matrix by it.
    """
    if parameter.numel():
        yield parameter
    if name.endswith(".weight") and hasattr(module, "cpu_linear"):
        width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
        eye = torch.eye(width, dtype=parameter.dtype)
        yield torch.cat([module.cpu_linear(rows, module.weight, None) for rows in eye.split(512)]).T
