"""The tensors of a sharded model on rank 0, a few rows at a time: no process ever holds more than a block of what others have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard

BLOCK = 64 << 20  # Bytes that are sent at a time.


def blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of a tensor in order, as blocks on the CPU: the number of the first row, and the rows.

    Every process of a distributed run walks through it, and only rank 0 gets anything. A tensor that is not sharded is taken
    from rank 0. One without dimensions is one row.
    """
    own = rank()
    if not isinstance(tensor, DTensor):
        if own == 0:
            yield from _cut(tensor.detach(), 0)
        return
    mesh, placed = tensor.device_mesh, tensor.placements
    assert mesh.ndim == 1 and placed == (Shard(0),), f"FSDP2 shards by rows over one group, not {placed} over {mesh}"
    owners, local = mesh.mesh.flatten().tolist(), tensor.to_local().detach()
    rows = tensor.shape[0]
    share = -(-rows // len(owners))  # as torch.chunk cuts it
    for number, owner in enumerate(owners):
        first, last = min(rows, number * share), min(rows, (number + 1) * share)
        if owner == 0 == own:
            yield from _cut(local, first)
        elif own == owner:
            for _, block in _cut(local, first):
                distributed.send(block.contiguous(), dst=0)
        elif own == 0:
            shape = torch.empty(last - first, *tensor.shape[1:], dtype=tensor.dtype, device="meta")
            for row, block in _cut(shape, first):
                received = torch.empty(block.shape, dtype=block.dtype)
                distributed.recv(received, src=owner)
                yield row, received


def rank() -> int:
    """The number of this process; 0 for one that works alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on rank 0; an empty one of the same shape, which holds nothing, on the other ranks. A call of all."""
    full = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu" if rank() == 0 else "meta")
    for row, block in blocks(tensor):
        full.view(-1, *tensor.shape[1:])[row : row + len(block)] = block
    return full


def _cut(tensor: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor in blocks of rows, on the CPU, or where it holds nothing. first: the number of its first row."""
    rows = tensor if tensor.dim() else tensor.reshape(1)
    if not rows.numel():
        return
    step = max(1, BLOCK // max(1, rows[0].nbytes))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield first + start, block if block.device.type == "meta" else block.cpu()
