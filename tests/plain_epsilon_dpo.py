"""ε-DPO with the whole logits of policy and reference, term by term as the formulas read: what the lean one must equal."""

import torch
from torch import Tensor


def plain_logps(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, epsilon: float,
    bias: Tensor | None = None, ref_bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """log π, log π_ref, log π⁺, log π⁻ of each token, (N,), in the dtype that comes in."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def of_targets(z: Tensor) -> Tensor:
        return z.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    z, z_ref = logits(hidden, weight, bias), logits(ref_hidden, ref_weight, ref_bias).detach()
    plus, minus = perturbed(z.detach(), z_ref, epsilon)
    return of_targets(z), of_targets(z_ref), of_targets(plus), of_targets(minus)


def perturbed(z: Tensor, z_ref: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """z⁺ = (1+ε)z − ε·z_ref and z⁻ = (1−ε)z + ε·z_ref."""
    return (1 + epsilon) * z - epsilon * z_ref, (1 - epsilon) * z + epsilon * z_ref
