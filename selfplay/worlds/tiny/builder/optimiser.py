"""How the builder trains: batches of like lengths, and AdamW whose gradients are summed over the workers."""

import random
from collections.abc import Sequence

import torch
from torch import nn


class Optimiser:
    """AdamW under a schedule (warm-up, then linear to zero) on one flat buffer, gradients summed over the workers."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, steps: int) -> None:
        flat = torch.cat([p.detach().reshape(-1) for p in parameters])
        self.flat = nn.Parameter(flat)
        self.grad = torch.zeros_like(flat)
        start = 0
        for p in parameters:
            p.data = self.flat.data[start : start + p.numel()].view_as(p)
            p.grad = self.grad[start : start + p.numel()].view_as(p)
            start += p.numel()
        self.flat.grad = self.grad
        self.inner = torch.optim.AdamW([self.flat], lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.lr, self.steps, self.done, self.warm = lr, steps, 0, max(1, steps // 20)

    def step(self) -> None:
        """One update; also empties the gradients."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.grad)
        norm = self.grad.norm()
        if norm > 1.0:
            self.grad.mul_(1.0 / norm)
        self.inner.param_groups[0]["lr"] = self.lr * min(
            (self.done + 1) / self.warm, (self.steps - self.done) / max(1, self.steps - self.warm)
        )
        self.inner.step()
        self.done += 1
        self.grad.zero_()


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of `size` items of about one length, in random order; what is left over is dropped."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = size * 16
    made = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        made += [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
    rng.shuffle(made)
    return made
