"""Linear layers in single precision that oneDNN computes, on a CPU.

PyTorch has MKL compute them. On a processor that is not Intel's, MKL uses about half of what the processor can do. On one
core of an AMD EPYC with AVX-512, layers of a small model run at 107 GFLOP/s by MKL and at 240 GFLOP/s by oneDNN. The
results differ by rounding alone.
"""

import os
from typing import Any

import torch
from torch import nn

# oneDNN makes a kernel for each shape, so for each number of tokens in a batch. It keeps 1,024 of them, and the layer of
# PyTorch above it keeps as many. With a small model they take 900 MiB after some hundred requests. Requests take about the
# same time when only a few are kept.
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


class Linear(nn.Linear):
    """A linear layer without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # For a few tokens, making a kernel takes longer than it saves. They go this way all the same: so the product of a
        # token has the same bits in every batch, and a round that was interrupted gets the same rewards.
        return _product(x, self.weight, self.bias)


def take_over(model: nn.Module) -> bool:
    """Have oneDNN compute the linear layers of a float32 model on a CPU. False: the model, or this PyTorch, does not fit.

    Layers of other classes, such as quantised ones, stay as they are. From here on this process keeps few kernels for all of
    its models, unless oneDNN has been used in it before.
    """
    for name, value in FEW_KERNELS.items():
        os.environ.setdefault(name, value)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()) or not _works():
        return False
    for layer in layers:
        layer.__class__ = Linear
    return True


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    # The compiler of PyTorch turns a linear layer into this operation, which has no public name.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _works() -> bool:
    try:
        return bool(torch.equal(_product(torch.ones(2, 3), torch.ones(4, 3), None), torch.full((2, 4), 3.0)))
    except (AttributeError, RuntimeError):
        return False
