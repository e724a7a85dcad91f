"""The mathematics of ε-DPO («KL Penalty Control via Perturbation for DPO», Lee et al., NeurIPS 2025, arXiv 2502.13177).

Tensors in, tensors out: no models, no IO. Shapes: B pairs, N response tokens, V words of the vocabulary; all
log-probabilities are in nats. Where this departs from the authors' code:
- z⁺ = z + ε(z − z_ref) instead of (1+ε)z − ε·z_ref: the same number, but exactly z where policy and reference agree;
- q⁺ and q⁻ are compared with q through sums of per-token differences, not as differences of sums;
- label smoothing is −(1−λ) log σ(u) − λ log σ(−u): the authors' code has the same sign in both arguments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 512  # tokens whose perturbed logits exist at a time


def epsilon_steps(logratio: Tensor, logratio_plus: Tensor, logratio_minus: Tensor) -> Tensor:
    """Direction s in {-1, 0, 1}, int64 (B,), in which each pair wants its β to go.

    The arguments, (B,), are q = log π(y_w|x) − log π(y_l|x) under the policy, under its perturbation towards a smaller
    β (z⁺) and towards a larger one (z⁻). s = +1 where q⁺ > q > q⁻ strictly, −1 where q⁻ > q > q⁺, else 0; NaN gives 0.
    Any common offset of the three may be left out: (0, q⁺ − q, q⁻ − q) gives the same steps.
    """
    up = (logratio_plus > logratio) & (logratio > logratio_minus)
    down = (logratio_minus > logratio) & (logratio > logratio_plus)
    return up.long() - down.long()


def next_beta(beta: float, mean_step: float, epsilon: float) -> float:
    """β for the next optimizer step: β / (1 + ε·mean(s)), the mean over all pairs of the step that was just taken."""
    return beta / (1.0 + epsilon * mean_step)


def pair_betas(beta: float, steps: Tensor, epsilon: float) -> Tensor:
    """Instance β_i = β / (1 + ε·s_i), float32 (B,)."""
    return beta / (1.0 + epsilon * steps.float())


def pair_losses(margins: Tensor, betas: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, (B,): −(1−λ) log σ(u) − λ log σ(−u) with u = β_i · margin_i.

    `margins` (B,): log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l). `label_smoothing`: λ in [0, 0.5).
    """
    u = betas * margins
    losses = -F.logsigmoid(u)
    if label_smoothing == 0:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-u)


def chosen_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, float32 (N,), from logits (N, V) of any float type and targets (N,)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def perturbed_logps(logits: Tensor, ref_logits: Tensor, targets: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities under the two perturbed policies: (logp⁺, logp⁻), float32 (N,), without gradient.

    z± = z ± ε(z − z_ref) with both logits (N, V) cast to float32 before they are mixed (mixed
    in bf16 the steps would be noise). z⁺ approximates the policy trained at β/(1+ε), z⁻ at β/(1−ε).
    """
    plus = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    minus = torch.empty_like(plus)
    with torch.no_grad():
        for i in range(0, len(targets), CHUNK_TOKENS):
            part = slice(i, i + CHUNK_TOKENS)
            z = logits[part].float()
            shift = (z - ref_logits[part].float()).mul_(epsilon)
            plus[part] = chosen_logps(z + shift, targets[part])
            minus[part] = chosen_logps(z - shift, targets[part])
    return plus, minus
