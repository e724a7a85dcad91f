"""Logits of an output head, one tile (tokens × words) at a time, and what is summed over the tiles of a token.

Shapes: N tokens, V words, H hidden units; a tile has T tokens and C words and is float32 whatever the model's dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Tile(NamedTuple):
    """The most of the (tokens × vocabulary) logits that exists at a time, in float32."""

    tokens: int
    words: int

    def buffers(self, n: int, tokens: int, words: int, device: torch.device) -> tuple[Tensor, ...]:
        """`n` buffers for tiles of at most this size over so many tokens and words."""
        size = min(self.tokens, max(tokens, 1)) * min(self.words, words)
        buffers: tuple[Tensor, ...] = torch.empty(n, size, dtype=torch.float32, device=device).unbind()
        return buffers


# Smaller tiles stay nearer to the cores, larger ones mean fewer operations: on two threads that others disturb,
# 1024 × 2048 took twice the seconds of these 64 MB, threads waiting for each other; alone it is 5 % faster.
CPU_TILE = Tile(2048, 8192)
GPU_TILE = Tile(2048, 16384)


def usual_tile(device: torch.device) -> Tile:
    return CPU_TILE if device.type == "cpu" else GPU_TILE


def slices(length: int, step: int) -> Iterator[slice]:
    """Slices that cover `length`; for 0 one empty slice, so that a product over no tokens is still written."""
    for start in range(0, max(length, 1), step):
        yield slice(start, min(start + step, length))


@dataclass(frozen=True, slots=True)
class Projection:
    """An output head over hidden states: z = logit_scale·(W h + b), then softcap·tanh(z / softcap) if there is one."""

    hidden: Tensor
    """(N, H), in the dtype of the products."""
    weight: Tensor
    """(V, H)"""
    bias: Tensor | None
    """(V,)"""
    logit_scale: float
    softcap: float | None

    @classmethod
    def over(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
    ) -> Self:
        """The projection of `hidden`; under autocast its products are made in autocast's dtype."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        return cls(hidden, weight, bias, logit_scale, softcap)

    @property
    def shape(self) -> tuple[int, int]:
        """N, V"""
        return self.hidden.size(0), self.weight.size(0)

    def rows(self, words: slice) -> Tensor:
        """Rows of the weight, (C, H), as numbers of the dtype of the products; on a CPU they are float32 (`_products_in`)."""
        rows = self.weight[words].to(self.hidden.dtype)
        return rows if rows.is_cuda else rows.float()

    def shares_rows(self, other: Self) -> bool:
        """Whether another projection has the same rows: a model and itself without its adapter have one head."""
        mine, others = ((one.weight.data_ptr(), one.weight.dtype, one.hidden.dtype) for one in (self, other))
        return mine == others

    def logits(self, tokens: slice | Tensor, words: slice, rows: Tensor, buffer: Tensor) -> Tensor:
        """The tile (T, C) of these tokens and words, whose rows of the weight are given, written to `buffer` (≥ T·C elements)."""
        hidden = self.hidden[tokens]
        tile = _view(buffer, len(hidden), len(rows))
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # Summed and kept in float32: no logit is ever rounded to the dtype of the model.
            torch.mm(hidden, rows.t(), torch.float32, out=tile)
        else:
            with _products_in(hidden.dtype):
                torch.mm(hidden.float(), rows.t(), out=tile)
        if self.bias is not None:
            tile.add_(self.bias[words])
        if self.logit_scale != 1.0:
            tile.mul_(self.logit_scale)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile


def _view(buffer: Tensor, tokens: int, words: int) -> Tensor:
    return buffer[: tokens * words].view(tokens, words)


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """total = beta·total + a @ b, in float32, `b` in the dtype of the model; with beta 0 `total` is only written."""
    if b.is_cuda and b.dtype != torch.float32:
        torch.addmm(total, a.to(b.dtype), b, torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a, b.float(), beta=beta)


@contextmanager
def _products_in(dtype: torch.dtype) -> Iterator[None]:
    """Where a CPU makes products of float32 tensors that hold numbers of this dtype.

    It has no product of bfloat16 numbers with a float32 result. But it may read factors as bfloat16, which is faster where the
    processor multiplies such numbers; these lose nothing by it, and are summed in float32 as before.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class RunningSoftmax:
    """Log-sum-exp of each token over the tiles seen so far, and the logit of its target. All (N,), float32."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self._peak = torch.full(targets.shape, -torch.inf, dtype=torch.float32, device=targets.device)
        self.total = torch.zeros_like(self._peak)
        """Σ exp(z − peak)"""
        self.target = torch.zeros_like(self._peak)
        """Logit of the target."""

    def add(self, tile: Tensor, tokens: slice, words: slice) -> Tensor:
        """Add the tile (T, C) of these tokens and words, which becomes exp(z − peak) in place.

        Returns exp(old peak − new peak), (T,): what sums over the earlier tiles are to be multiplied by.
        """
        column, here = locate(self._targets[tokens], words)
        self.target[tokens] += torch.where(here, tile.gather(1, column.unsqueeze(1)).squeeze(1), 0.0)
        old = self._peak[tokens]
        peak = torch.maximum(old, tile.amax(dim=1))
        rescale = (old - peak).exp_()
        self.total[tokens] = self.total[tokens] * rescale + tile.sub_(peak.unsqueeze(1)).exp_().sum(dim=1)
        self._peak[tokens] = peak
        return rescale

    def logp(self) -> Tensor:
        """Log-probability of the targets, nats."""
        return self.target - self._peak - self.total.log()

    def log_total(self) -> Tensor:
        """Log-sum-exp."""
        return self._peak + self.total.log()


def locate(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """Column (T,) of each target in the tile of these words, and whether it lies there; where not, any column."""
    column = targets - words.start
    here = (column >= 0) & (column < words.stop - words.start)
    return column.clamp(0, words.stop - words.start - 1), here
