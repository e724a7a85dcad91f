"""What an optimizer step adds up over its pairs, and the means that are logged of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

# By name; the order is that of the tensor that processes exchange.
SUMS = ("pairs", "up", "down", "loss", "logps/chosen", "logps/rejected", "logratios/chosen", "logratios/rejected",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "nll/chosen", "kl/pair_tokens")  # fmt: skip


def of_micro_batch(
    beta: float, weights: Tensor, steps: Tensor, losses: Tensor, logp: Tensor, ratio: Tensor, nll: Tensor, kl: Tensor
) -> Tensor:
    """The sums over the pairs of one micro-batch, (len(SUMS),).

    weights (B,): how often a pair counts. steps, losses, nll (B,). Of responses in rows [chosen; rejected], (2B,): logp
    (nats), ratio (log π/π_ref, nats) and kl.
    """
    chosen, rejected = (beta * ratio).chunk(2)
    values = {
        "pairs": torch.ones_like(losses), "up": (steps > 0).float(), "down": (steps < 0).float(), "loss": losses,
        "logps/chosen": logp.chunk(2)[0], "logps/rejected": logp.chunk(2)[1],
        "logratios/chosen": ratio.chunk(2)[0], "logratios/rejected": ratio.chunk(2)[1], "nll/chosen": nll,
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": (chosen > rejected).float(),
        "kl/pair_tokens": kl.view(2, -1).mean(0),
    }  # fmt: skip
    return torch.stack([(weights * values[name]).sum() for name in SUMS])


def means(sums: Mapping[str, float], beta: float) -> dict[str, float]:
    """What is logged of the sums of a step, by name."""
    n = sums["pairs"]
    found = {name: sums[name] / n for name in SUMS if "/" in name}
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    found |= {"epsilon/up": sums["up"] / n, "epsilon/down": sums["down"] / n}
    found["epsilon/zero"] = 1 - found["epsilon/up"] - found["epsilon/down"]
    return found | {"beta": beta}
