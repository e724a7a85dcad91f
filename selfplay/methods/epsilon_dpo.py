"""The mathematics of ε-DPO («KL Penalty Control via Perturbation for DPO», Lee et al., NeurIPS 2025, arXiv 2502.13177).

Tensors in, tensors out: no models, no IO. Shapes: B pairs, N response tokens, V words of the vocabulary, H hidden
units; all log-probabilities are in nats. Where this departs from the authors' code:
- the logits (N, V) of neither model ever exist: `fused_logps` projects hidden states in tiles, backward as forward;
- z⁺ = z + ε(z − z_ref) instead of (1+ε)z − ε·z_ref: the same number, but exactly z where policy and reference agree;
- q⁺ and q⁻ are compared with q through sums of per-token shifts log π± − log π, each computed as such: as
  differences of log-probabilities their rounding may be as large as they are;
- label smoothing is −(1−λ) log σ(u) − λ log σ(−u): the authors' code has the same sign in both arguments.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfplay.methods.tiles import Projection, RunningSoftmax, Tile, add_product, locate, slices, usual_tile

Logps = tuple[Tensor, Tensor, Tensor, Tensor]

WIDE = 2.0  # nats: where ε moves a logit by more, expm1 could cancel or overflow


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


def chosen_drop(logratios: Sequence[Sequence[float]]) -> float:
    """Nats a response by which chosen AND rejected have fallen below the reference: 0 where either has not.

    `logratios`: of each of the last optimizer steps the mean log π/π_ref of its chosen and of its rejected responses;
    they are averaged. DPO is content to lower both, the rejected ones more: past some point the policy has learnt
    nothing but to avoid everything in the data.
    """
    means: list[float] = [sum(side) / len(logratios) for side in zip(*logratios, strict=True)]
    return max(0.0, -max(means))


def chosen_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, float32 (N,), from logits (N, V) of any float type and targets (N,)."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


# --- from hidden states -----------------------------------------------------------------------------------------------


def fused_logps(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, epsilon: float,
    **options: Any,
) -> Logps:  # fmt: skip
    """log π, log π_ref, log π⁺ and log π⁻ of each response token, float32 (N,) each; only the first has a gradient.

    `fused_shifts`, whose arguments and options these are, with the perturbed log-probabilities in place of the shifts.
    """
    logp, ref_logp, plus, minus = fused_shifts(hidden, weight, ref_hidden, ref_weight, targets, epsilon, **options)
    return logp, ref_logp, logp.detach() + plus, logp.detach() + minus


def fused_shifts(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, targets: Tensor, epsilon: float, *,
    bias: Tensor | None = None, ref_bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None,
    tile: Tile | None = None,
) -> Logps:  # fmt: skip
    """log π, log π_ref, log π⁺ − log π and log π⁻ − log π of each response token, float32 (N,) each.

    `hidden` (N, H), float32, bfloat16 or float16, is what the policy's output head reads, `weight` (V, H) and `bias`
    (V,) are that head; `ref_*` are those of the reference; `targets` (N,) the tokens. The logits of both are
    z = logit_scale·(W h + b), then softcap·tanh(z / softcap) where there is a softcap, in float32; z± = z ± ε(z − z_ref)
    with ε in [0, 1). z⁺ approximates the policy trained at β/(1+ε), z⁻ at β/(1−ε).

    Only log π has a gradient: to those of `hidden`, `weight` and `bias` that want one. The backward pass projects
    again; in either no more of a model's logits than `tile` exists. Products are made in the dtype of `hidden`, or
    autocast's, and summed in float32.

    With d = z − z_ref, log π± − log π = ±ε·d_target − log(1 + Σ_v π_v·expm1(±ε·d_v)): 0 where policy and reference
    agree, and exact to the rounding of ε·d instead of that of log π. A token with any |ε·d_v| above `WIDE` takes the
    difference of two log-probabilities instead. With ε = 0 the shifts are zeros and cost nothing.

    Raises ValueError for models of different vocabularies and an ε out of range.
    """
    if weight.size(0) != ref_weight.size(0):
        raise ValueError(f"the policy has {weight.size(0)} words and the reference {ref_weight.size(0)}: use one model")
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must lie in [0, 1), got {epsilon}")
    reference = Projection.over(ref_hidden, ref_weight, ref_bias, logit_scale, softcap)
    logps: Logps = _Fused.apply(
        hidden, weight, bias, targets, reference, epsilon, logit_scale, softcap, tile or usual_tile(hidden.device)
    )
    return logps


def lean_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, logit_scale: float = 1.0,
    softcap: float | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """log π of each token, float32 (N,), with gradient, where there is no reference; arguments as in `fused_shifts`."""
    logp: Tensor = _Fused.apply(
        hidden, weight, bias, targets, None, 0.0, logit_scale, softcap, tile or usual_tile(hidden.device)
    )[0]
    return logp


class _Fused(torch.autograd.Function):
    """log π, with gradient, and what is learnt of the reference on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, reference: Projection | None,
        epsilon: float, logit_scale: float, softcap: float | None, tile: Tile,
    ) -> Logps:  # fmt: skip
        policy = Projection.over(hidden, weight, bias, logit_scale, softcap)
        with torch.autocast(hidden.device.type, enabled=False):
            own, ref_logp, plus, minus = _scan(policy, reference, targets, epsilon, tile)
        ctx.save_for_backward(policy.hidden, weight, bias, targets, own.log_total())
        ctx.settings = (logit_scale, softcap, tile, hidden.dtype)
        ctx.mark_non_differentiable(ref_logp, plus, minus)
        ctx.set_materialize_grads(False)
        return own.logp(), ref_logp, plus, minus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_logp is None:
            return (None,) * 9
        hidden, weight, bias, targets, log_total = ctx.saved_tensors
        logit_scale, softcap, tile, dtype = ctx.settings
        policy = Projection(hidden, weight, bias, logit_scale, softcap)
        gradients = _gradients(policy, targets, log_total, grad_logp.float(), ctx.needs_input_grad[:3], tile)
        grad_hidden = None if gradients[0] is None else gradients[0].to(dtype)
        return grad_hidden, *gradients[1:], *(None,) * 6


def _scan(
    policy: Projection, reference: Projection | None, targets: Tensor, epsilon: float, tile: Tile
) -> tuple[RunningSoftmax, Tensor, Tensor, Tensor]:
    """The policy's softmax over all tiles, and log π_ref, log π⁺ − log π, log π⁻ − log π; zeros for what is not asked."""
    own, other = RunningSoftmax(targets), RunningSoftmax(targets)
    plus, minus, widest = torch.zeros(3, len(targets), dtype=torch.float32, device=targets.device).unbind()
    if reference is None:
        epsilon = 0.0
    n, vocabulary = policy.shape
    first, *more = tile.buffers(1 if reference is None else 3 if epsilon else 2, n, vocabulary, targets.device)
    for words in slices(vocabulary, tile.words):
        rows = policy.rows(words)
        if reference is not None:
            ref_rows = rows if reference.shares_rows(policy) else reference.rows(words)
        for tokens in slices(n, tile.tokens):
            z = policy.logits(tokens, words, rows, first)
            if reference is not None:
                spare = reference.logits(tokens, words, ref_rows, more[0])
                if epsilon:  # between the two: adding a tile to a softmax overwrites it
                    shift = torch.sub(z, spare, out=more[1][: z.numel()].view_as(z)).mul_(epsilon)
                    reach = torch.maximum(shift.amax(dim=1), -shift.amin(dim=1))  # aminmax is slower here
                    widest[tokens] = torch.maximum(widest[tokens], reach)
                other.add(spare, tokens, words)
            rescale = own.add(z, tokens, words)
            if epsilon:
                shift.expm1_()
                plus[tokens] = plus[tokens] * rescale + torch.mul(z, shift, out=spare).sum(dim=1)
                shift.div_(torch.add(shift, 1.0, out=spare))  # −expm1(−x) = expm1(x) / (1 + expm1(x))
                minus[tokens] = minus[tokens] * rescale - torch.mul(z, shift, out=spare).sum(dim=1)
    if not epsilon:
        return own, other.logp() if reference else plus, plus, minus
    target = epsilon * (own.target - other.target)
    plus = target - plus.div_(own.total).log1p_()
    minus = -target - minus.div_(own.total).log1p_()
    if reference is not None and (wide := (widest > WIDE).nonzero().squeeze(1)).numel():
        for tokens in wide.split(max(1, tile.tokens * tile.words // vocabulary)):
            plus[tokens], minus[tokens] = _plain_shifts(policy, reference, tokens, targets[tokens], epsilon)
    return own, other.logp(), plus, minus


def _plain_shifts(
    policy: Projection, reference: Projection, tokens: Tensor, targets: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """log π⁺ − log π and log π⁻ − log π of a few tokens by their definition, over the whole vocabulary."""
    every = slice(0, policy.shape[1])
    buffer = policy.hidden.new_empty(len(tokens) * every.stop, dtype=torch.float32)
    z = policy.logits(tokens, every, policy.rows(every), buffer)
    shift = reference.logits(tokens, every, reference.rows(every), torch.empty_like(buffer)).sub_(z).mul_(-epsilon)
    logp = chosen_logps(z, targets)
    return chosen_logps(z + shift, targets) - logp, chosen_logps(z - shift, targets) - logp


def _gradients(
    policy: Projection, targets: Tensor, log_total: Tensor, grad_logp: Tensor, wanted: tuple[bool, ...], tile: Tile
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_logp·log π to hidden states (float32), weight and bias, those that are wanted.

    ∂ log π_t / ∂z = onehot − softmax. Words outside, tokens inside: a row of the weight's gradient is done
    once its tile is, so that only a tile of it need be float32 where the weight is not.
    """
    n, vocabulary = policy.shape
    hidden, weight, bias = policy.hidden, policy.weight, policy.bias
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    (buffer,) = tile.buffers(1, n, vocabulary, hidden.device)
    for words in slices(vocabulary, tile.words):
        rows = policy.rows(words)
        weight_sum, bias_sum = None, torch.zeros(len(rows), dtype=torch.float32, device=hidden.device)
        if grad_weight is not None:
            weight_sum = grad_weight[words]
            if weight.dtype != torch.float32:
                weight_sum = torch.empty_like(weight_sum, dtype=torch.float32)
        for tokens in slices(n, tile.tokens):
            z = policy.logits(tokens, words, rows, buffer)
            slope = None
            if policy.softcap is not None:
                slope = (z / policy.softcap).square_().neg_().add_(1.0)
            gradient = grad_logp[tokens]
            z.sub_(log_total[tokens].unsqueeze(1)).exp_().mul_(-gradient.unsqueeze(1))
            column, here = locate(targets[tokens], words)
            z.scatter_add_(1, column.unsqueeze(1), torch.where(here, gradient, 0.0).unsqueeze(1))
            if slope is not None:
                z.mul_(slope)
            if policy.logit_scale != 1.0:
                z.mul_(policy.logit_scale)
            if grad_hidden is not None:
                add_product(grad_hidden[tokens], z, rows)
            if weight_sum is not None:
                add_product(weight_sum, z.t(), hidden[tokens], beta=int(tokens.start > 0))
            if grad_bias is not None:
                bias_sum += z.sum(dim=0)
        if grad_weight is not None and weight.dtype != torch.float32:
            grad_weight[words] = weight_sum
        if grad_bias is not None:
            grad_bias[words] = bias_sum
    return grad_hidden, grad_weight, grad_bias
