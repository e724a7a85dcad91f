"""Gradient features: the projected gradient of each pair's ε-DPO loss, from one batched forward and backward.

BPO (Wang et al., 2025, arXiv 2411.10914) clusters pairs by the gradient that each would cause. A linear layer with input
a_t and output gradient δ_t has, for pair i, the weight gradient Σ_{t in i} δ_t ⊗ a_t; with P = P_out ⊗ P_in its
projection is Σ_t (P_out δ_t) ⊗ (P_in a_t), so two thin products in a forward and a backward hook and one batched product
give every pair's at once (LoGra, arXiv 2405.13954, does so for influence functions; LESS, arXiv 2402.04333, takes one
backward a pair). No weight gradient is ever computed.

A feature is the SUM of its layers' projections, each layer with a P of its own: a projection of the gradient of all
layers as one vector. Side by side, each layer would have its few dimensions whatever its share of the gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from selfplay import seeds
from selfplay.methods import head
from selfplay.methods.epsilon_dpo import epsilon_steps, fused_shifts, lean_logps, pair_betas, pair_losses

DUST = 1e-6  # a pair's gradient, relative to its responses' own, below which float32 has no digit of it right


def pair_features(
    model: Any,
    batch: Mapping[str, Tensor],
    dim: int,
    seed: int,
    *,
    layers: int | None = None,
    reference: Any = None,
    **loss: float,
) -> Tensor:
    """Projected gradients of the pairs' losses, float32 (B, dim): each pair's own, as if it were alone.

    model: a causal language model, plain or with LoRA, without dropout (`eval()`, or trained without). batch: as the
    trainer's collator makes it, rows [chosen; rejected], (2B, T): `input_ids`, `attention_mask`, `completion_mask`.
    layers: the last decoder blocks whose linear layers count, None for all; with LoRA the adapters' A and B in them,
    and B alone while every B is 0, when the gradient of each A is 0. reference: another model, or None where the policy
    is its own reference. loss: `beta`, `epsilon`, `label_smoothing` and `nll_weight` of `PairGradients.__call__`.

    The projection depends on `seed`, `dim` and the layers' names and shapes alone. Parameters get no gradients. Raises
    ValueError for a model that has no such layers, or layers that mix up rows and positions (experts do).
    """
    with PairGradients(model, dim, seed, layers=layers, reference=reference) as gradients:
        return gradients(batch, **loss)


def projection(seed: int, name: str, shape: tuple[int, int], dim: int) -> tuple[Tensor, Tensor]:
    """P_out (p, out) and P_in (q, in) of the layer `name`, whose weight is (out, in): Gaussian, with p · q = dim.

    The expectation of PᵀP, P = P_out ⊗ P_in, is the identity. p and q are as even as they can be with p ≤ out and
    q ≤ in. Layers of one block with equal q and in share P_in; their projections are independent through P_out.
    """
    splits = [(p, dim // p) for p in range(1, dim + 1) if dim % p == 0]
    p, q = min([s for s in splits if s[0] <= shape[0] and s[1] <= shape[1]] or splits, key=lambda s: (max(s), s[0]))

    def gaussian(rows: int, columns: int, *what: object) -> Tensor:
        generator = torch.Generator().manual_seed(seeds.derive(seed, "projection", *what, rows, columns))
        return torch.randn(rows, columns, generator=generator) / math.sqrt(rows)

    return gaussian(p, shape[0], "out", name), gaussian(q, shape[1], "in", _block(name))


class PairGradients(AbstractContextManager["PairGradients"]):
    """`pair_features` for many batches: `with PairGradients(model, dim, seed) as g:`, then g(batch, beta=…) for each.

    Inside, the chosen layers (`layers`, by name) have hooks and no parameter asks for a gradient; both end with it.
    """

    def __init__(self, model: Any, dim: int, seed: int, *, layers: int | None = None, reference: Any = None) -> None:
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self._model, self._reference, self._dim = model, reference, dim
        self.layers = linear_layers(model, layers)
        self._projections: dict[str, tuple[Tensor, Tensor]] = {}
        shared: dict[tuple[Any, ...], Tensor] = {}
        for name, layer in self.layers.items():
            device = layer.weight.device
            p_out, p_in = projection(seed, name, (layer.out_features, layer.in_features), dim)
            p_in = shared.setdefault((_block(name), *p_in.shape), p_in.T.contiguous().to(device))
            self._projections[name] = (p_out.T.contiguous().to(device), p_in)
        for one in (model, reference):
            if one is not None and not hasattr(_bare(one).get_output_embeddings(), "head_of"):
                head.make_lean(_bare(one))
        self._in_backward = False
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # an input, its P_in and their product
        self._sum = torch.empty(0)

    def __enter__(self) -> PairGradients:
        self._frozen = [p for p in self._model.parameters() if p.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._hooks = [
            layer.register_forward_hook(lambda _, given, out, name=name: self._keep(name, given[0], out))
            for name, layer in self.layers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._forget()

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        *,
        beta: float = 0.1,
        epsilon: float = 0.0,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
    ) -> Tensor:
        """Features of the pairs of one batch, float32 (B, dim). The loss is that of the trainer, of each pair alone.

        Where the policy is its own reference, margin and step are 0 and ε has no effect.
        """
        ids = batch["input_ids"]
        self._shape, self._sum = ids.shape, torch.zeros(len(ids), self._dim, device=ids.device)
        with torch.enable_grad():
            total = self._losses(batch, beta, epsilon, label_smoothing, nll_weight).sum()
            self._in_backward = True
            try:
                total.backward()
            finally:
                self._in_backward = False
        chosen, rejected = self._sum.chunk(2)
        self._forget()
        # Responses that cancel to within rounding leave dust, whose direction is that of nothing.
        cancelled = (chosen + rejected).norm(dim=1) <= DUST * torch.maximum(chosen.norm(dim=1), rejected.norm(dim=1))
        return torch.where(cancelled[:, None], 0.0, chosen + rejected)

    def _losses(
        self, batch: Mapping[str, Tensor], beta: float, epsilon: float, label_smoothing: float, nll_weight: float
    ) -> Tensor:
        """Losses of the pairs, (B,)."""
        mask = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][mask]
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}

        def picked(hidden: Tensor, own: head.Head) -> tuple[Tensor, head.Head]:
            return hidden[:, :-1][mask], own

        with torch.no_grad():
            other = None if self._reference is None else self._reference(**inputs, at_head=picked)[0]

        def logps(hidden: Tensor, own: head.Head) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            options: dict[str, Any] = {"bias": own.bias, "logit_scale": own.logit_scale, "softcap": own.softcap}
            hidden, _ = picked(hidden, own)
            if other is None:
                logp = lean_logps(hidden, own.weight, targets, **options)
                return logp, logp.detach(), *torch.zeros(2, len(logp), device=logp.device).unbind()
            (ref_hidden, ref), ref_bias = other, other[1].bias
            return fused_shifts(
                hidden, own.weight, ref_hidden, ref.weight, targets, epsilon, ref_bias=ref_bias, **options
            )

        (logp, ref_logp, plus, minus), _ = self._model(**inputs, at_head=logps)

        def difference(values: Tensor) -> Tensor:
            """Chosen minus rejected, (B,), of values of the tokens, (N,)."""
            chosen, rejected = per_response(values, mask).chunk(2)
            return chosen - rejected

        q_plus, q_minus = difference(plus), difference(minus)  # less q
        betas = pair_betas(beta, epsilon_steps(torch.zeros_like(q_plus), q_plus, q_minus), epsilon)
        losses = pair_losses(difference(logp - ref_logp), betas, label_smoothing)
        if nll_weight > 0:
            losses = losses - nll_weight * (per_response(logp, mask) / mask.sum(dim=1)).chunk(2)[0]
        return losses

    def _keep(self, name: str, given: Tensor, out: Tensor) -> None:
        """After a layer's forward: keep its projected input until the gradient of its output comes."""
        if not torch.is_grad_enabled():
            raise ValueError("features need gradient checkpointing with use_reentrant=False: the other has no graph")
        if not out.requires_grad:
            out.requires_grad_()  # the graph begins here: nothing below the first chosen layers needs one
        # Under gradient checkpointing layers run again in the backward pass, for a graph that is never walked.
        if self._in_backward:
            return
        if given.shape[:-1] != self._shape:
            raise ValueError(
                f"layer {name} gets tokens as {tuple(given.shape[:-1])}, not as {tuple(self._shape)} (rows, positions): "
                "there is no telling whose they are; with experts choose `layers` without them"
            )
        p_out, p_in = self._projections[name]
        # Query, key and value read one tensor, one after another: it is projected once.
        if self._last is None or self._last[0] is not given or self._last[1] is not p_in:
            self._last = (given, p_in, given.detach().float() @ p_in)
        projected = self._last[2]

        def add(gradient: Tensor) -> None:
            # Nothing depends on what a padding position puts out, so its gradient, and with it its share, is 0.
            self._sum += ((gradient.float() @ p_out).transpose(1, 2) @ projected).flatten(1)

        out.register_hook(add)

    def _forget(self) -> None:
        """Drop the tensors of a batch."""
        self._sum = torch.empty(0)
        self._last = None


def linear_layers(model: Any, layers: int | None = None) -> dict[str, nn.Linear]:
    """What features are of, by name («3.self_attn.q_proj»): linear layers of the last `layers` decoder blocks, or all.

    With LoRA the active adapter's A and B, and B alone while every B is 0. Raises ValueError where there are none.
    """
    decoder = _bare(model).get_decoder()
    blocks = max((m for m in decoder.children() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    if layers is not None and not 1 <= layers <= len(blocks):
        raise ValueError(f"layers must lie in [1, {len(blocks)}], the blocks of {type(decoder).__name__}, got {layers}")
    plain: dict[str, nn.Linear] = {}
    lora: dict[str, nn.Linear] = {}
    for index in range(0 if layers is None else len(blocks) - layers, len(blocks)):
        for name, module in blocks[index].named_modules(prefix=str(index)):
            if isinstance(module, nn.Linear):
                plain[name] = module
            for adapter in getattr(module, "active_adapters", []) if hasattr(module, "lora_A") else []:
                if adapter in module.lora_A:
                    lora |= {f"{name}.lora_A": module.lora_A[adapter], f"{name}.lora_B": module.lora_B[adapter]}
    fresh = not any(layer.weight.any() for name, layer in lora.items() if name.endswith("lora_B"))
    chosen = {name: layer for name, layer in lora.items() if not fresh or name.endswith("lora_B")} or plain
    if not chosen:
        raise ValueError(f"the chosen blocks of {type(decoder).__name__} have no torch.nn.Linear to take gradients of")
    return chosen


def _bare(model: Any) -> Any:
    """The Hugging Face model under an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _block(name: str) -> str:
    """The block of a layer."""
    return name.partition(".")[0]


def per_response(values: Tensor, mask: Tensor) -> Tensor:
    """Sum per-token values (N,), given in the order of `mask` (2B, R), over each response: (2B,)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)
