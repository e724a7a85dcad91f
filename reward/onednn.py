"""Single-precision linear layers by oneDNN, on a CPU.

PyTorch gives them to MKL, which leaves half of a processor that is not Intel's unused: 107 against 240 GFLOP/s of one core of an
AMD EPYC with AVX-512, for the layers of a small model. The products are the same but for rounding.
"""

import os
from typing import Any

import torch
from torch import nn

# oneDNN makes a kernel for each shape, each number of tokens in a batch, and keeps 1,024; so does PyTorch's layer above it.
# With a small model that comes to 900 MiB within some hundred requests; kept or not, they take about the same time.
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}


class Linear(nn.Linear):
    """As its base; without gradients."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Few tokens too, though making a kernel takes longer than it saves there: a token's product then has the same bits
        # in every batch, and a round that was interrupted the same rewards.
        return _product(x, self.weight, self.bias)


def take_over(model: nn.Module) -> bool:
    """Make the linear layers of a float32 model on a CPU these; False where the model, or this PyTorch, is another.

    Layers of classes of their own (quantised ones, say) stay what they are. Kernels are few from here on for every model of
    this process, unless one has run by oneDNN before.
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
    # What PyTorch's own compiler makes of a linear layer; it has no public name.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _works() -> bool:
    try:
        return bool(torch.equal(_product(torch.ones(2, 3), torch.ones(4, 3), None), torch.full((2, 4), 3.0)))
    except (AttributeError, RuntimeError):
        return False
