"""A forward pass of a causal language model that ends before its output head, so that logits need never exist.

    head.make_lean(model)
    result, aux_loss = model(input_ids=ids, attention_mask=mask, at_head=f)

runs the body, then f(hidden states (B, T, H), Head) in place of the head, and gives what f gives. It goes through the
root's and the head's own `__call__`: the hooks of DDP, FSDP2 (which gather the head's weight, once) and accelerate fire
as they do around logits. Without `at_head` the model is as it was.

What lies between a body and its logits is taken from the config (logit scale, soft-capping) and the head (weight, bias;
tied or not). `agrees` compares that with the model's own logits, so that an architecture that does more there can be
refused.
"""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from selfplay.methods.tiles import Projection


class Head(NamedTuple):
    """An output head: z = logit_scale·(W h + b), then softcap·tanh(z / softcap) where there is a softcap."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None
    """(V,)"""
    logit_scale: float
    softcap: float | None


AtHead = Callable[[Tensor, Head], Any]


def make_lean(model: Any) -> None:
    """Let `model`, a PreTrainedModel without a wrapper around it, be called with `at_head`.

    `aux_loss` is the load-balancing loss of a mixture of experts called with `output_router_logits=True`, else None.
    Raises ValueError for a model whose logits cannot be made from its last hidden states by a linear layer.
    """
    if model.base_model is model:
        raise ValueError(f"{type(model).__name__} has no body apart from its output head: {_REFUSED}")
    for linear in _linears(model):
        _let_head_be_read(linear, logit_scale(model), getattr(_config(model), "final_logit_softcapping", None))
    whole = model.forward

    @functools.wraps(whole)  # `generate` and the Trainer look at its signature
    def forward(self: Any, *args: Any, at_head: AtHead | None = None, **kwargs: Any) -> Any:
        if at_head is None:
            return whole(*args, **kwargs)
        for name in ("labels", "logits_to_keep"):
            kwargs.pop(name, None)
        outputs = self.base_model(*args, **kwargs)
        result = self.get_output_embeddings()(outputs.last_hidden_state, at_head=at_head)
        if not kwargs.get("output_router_logits"):
            return result, None
        config = _config(self)
        return result, load_balancing_loss_func(
            outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
        )

    model.forward = MethodType(forward, model)


def read(model: Any) -> Head:
    """The head of a lean model outside its forward pass, without gradient; sharded ones are gathered, by all processes.

    With an adapter that keeps its own copy of the head («modules_to_save»), the copy that is active now.
    """
    linear = _active(model.get_output_embeddings())
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (linear.weight, linear.bias))
    head: Head = linear.head_of(weight.detach(), None if bias is None else bias.detach())
    return head


@torch.no_grad()
def agrees(model: Any, input_ids: Tensor) -> bool:
    """Whether a lean model's own logits are those that its head gives: a linear layer, scaled and soft-capped.

    `model` may be wrapped; `input_ids` (1, T): a few tokens. A call of all processes.
    """
    dtypes = []

    def project(hidden: Tensor, head: Head) -> Tensor:
        projection = Projection.over(hidden[0], *head)
        dtypes.append(projection.hidden.dtype)
        tokens, words = (slice(0, n) for n in projection.shape)
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = hidden.new_empty(tokens.stop * words.stop, dtype=torch.float32)
            return projection.logits(tokens, words, projection.rows(words), buffer)

    ours, _ = model(input_ids=input_ids, use_cache=False, at_head=project)
    theirs = model(input_ids=input_ids, use_cache=False).logits[0].float()
    tolerance = 2e-3 if dtypes == [torch.float32] else 3e-2  # their products may be rounded to TF32 or bfloat16
    return ours.shape == theirs.shape and not bool((ours - theirs).abs().max() > tolerance * theirs.abs().max())


_REFUSED = "ε-DPO projects hidden states itself and cannot train it"


def logit_scale(model: Any) -> float:
    """What a model multiplies its logits by; architectures name it differently."""
    config = _config(model)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)


def _config(model: Any) -> Any:
    return model.config.get_text_config()


def _linears(model: Any) -> list[nn.Linear]:
    """The output head, and its trained copies where an adapter keeps some."""
    module = model.get_output_embeddings()
    if isinstance(module, BaseTunerLayer):
        raise ValueError("an adapter on the output head is not supported: take lm_head out of target_modules")
    found = [module]
    if isinstance(module, ModulesToSaveWrapper):
        found = [module.original_module, *module.modules_to_save.values()]
    for one in found:
        if not isinstance(one, nn.Linear) or not one.weight.is_floating_point():
            raise ValueError(f"the output head is a {type(one).__name__}, not a plain linear layer: {_REFUSED}")
    return found


def _active(module: Any) -> Any:
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def _let_head_be_read(linear: nn.Linear, scale: float, softcap: float | None) -> None:
    """Let the layer be called with `at_head`, which then gets its input and its weights as they are in a forward."""
    product = linear.forward

    def head_of(weight: Tensor, bias: Tensor | None) -> Head:
        return Head(weight, bias, scale, softcap)

    def forward(self: nn.Linear, hidden: Tensor, at_head: AtHead | None = None) -> Any:
        if at_head is None:
            return product(hidden)
        return at_head(hidden, head_of(self.weight, self.bias))

    linear.head_of = head_of
    linear.forward = MethodType(forward, linear)
