"""How the rows of a micro-batch lie: B chosen responses, then the B rejected ones of the same pairs, (2B, T)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def response(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mask (2B, T−1) of the positions whose next token is of a response, and those N tokens, (N,)."""
    mask = inputs["completion_mask"][:, 1:].bool()
    return mask, inputs["input_ids"][:, 1:][mask]


def per_response(values: Tensor, mask: Tensor) -> Tensor:
    """Sum per-token values (N,), given in the order of `mask` (2B, R), over each response: (2B,)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)


def pair_difference(values: Tensor) -> Tensor:
    """Chosen minus rejected, (B,), of values in rows [chosen; rejected], (2B,)."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected


def pair_weights(inputs: Mapping[str, Tensor], count: int) -> Tensor:
    """Weights (B,) of the pairs of a micro-batch: 1 for the first `count`, 0 for the rest; `count` may be 0 or less."""
    ids = inputs["input_ids"]
    return (torch.arange(len(ids) // 2, device=ids.device) < count).float()
