"""What policy and reference say of the pairs of a micro-batch: the part of the trainer that runs the models.

Few tokens are computed that nobody needs. The two responses of a pair share their prompt, and pairs of like length go through
the models together (`layout`). The reference gets the very rows that the policy gets: the same numbers in other rows differ in
their last digits, and where both models are one the perturbed policies have to agree exactly, or ε's votes would be noise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from selfplay.methods import head
from selfplay.methods.epsilon_dpo import Logps, fused_shifts, lean_logps
from selfplay.training import layout
from selfplay.training.batches import per_response


class Passes:
    """The passes through the models, for a trainer of TRL that has them."""

    accelerator: Any
    args: Any
    aux_loss_enabled: bool
    model: Any
    ref_model: Any
    train_dataset: Any
    get_eval_dataloader: Any
    is_fsdp_enabled: bool
    _prepare_inputs: Any

    def __init__(self, *rest: Any, **kwargs: Any) -> None:
        self._shares: bool | None = None  # whether a pair is one row, once that is known
        super().__init__(*rest, **kwargs)

    @abstractmethod
    def _check_head(self, model: Any, unwrapped: Any, inputs: Mapping[str, Tensor]) -> None:
        """Raise TrainError for a model, used for the first time, whose head is not what we compute."""

    @abstractmethod
    def _as_reference(self) -> AbstractContextManager[Any]:
        """The reference to call, without gradient."""

    @abstractmethod
    def _as_it_is(self) -> AbstractContextManager[Any]:
        """While no activations are to be recomputed."""

    @abstractmethod
    def _autocast(self) -> AbstractContextManager[Any]:
        """What the policy runs in, for what is computed beside it."""

    def _responses(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """Of the responses of a micro-batch, summed over their tokens, (5, 2B): log π, log π/π_ref, log π± − log π and
        r·log r − r + 1; and the router's loss. The first two have a gradient.
        """
        found, taken, aux_loss = [], [], None
        for pairs in self._parts(inputs):
            part = inputs if pairs is None else layout.take(inputs, pairs)
            rows = self._rows(part)
            ref_hidden, ref_head = self._reference(part, rows)
            self._check_head(model, self.model, inputs)
            at_head = partial(self._logps, rows, ref_hidden, ref_head)
            (logp, ref_logp, plus, minus), aux_loss = self._forward(model, rows, at_head, self.aux_loss_enabled)
            for one in (logp, ref_logp, plus, minus):
                assert one.dtype == torch.float32, "sums over a response need all the digits of its log-probabilities"
            log_r = (logp - ref_logp).detach().clamp(max=20.0)
            tokens = (logp, logp - ref_logp, plus, minus, log_r.exp() * (log_r - 1) + 1)
            found.append(torch.stack([per_response(one, rows.mask) for one in tokens]))
            taken += [] if pairs is None else [*pairs, *(len(inputs["input_ids"]) // 2 + pair for pair in pairs)]
        sums = torch.cat(found, dim=1)
        return (sums[:, torch.tensor(taken).argsort()] if taken else sums), aux_loss

    def _logps(self, rows: layout.Rows, ref_hidden: Tensor, ref: head.Head, hidden: Tensor, own: head.Head) -> Logps:
        """log π, log π_ref and log π± − log π of each token of the responses, from all hidden states of the policy."""
        return fused_shifts(
            rows.at_responses(hidden), own.weight, ref_hidden, ref.weight, rows.targets, self.args.epsilon,
            bias=own.bias, ref_bias=ref.bias, logit_scale=own.logit_scale, softcap=own.softcap,
        )  # fmt: skip

    def _parts(self, inputs: Mapping[str, Tensor]) -> list[list[int] | None]:
        """Pairs that go through the models together, where that saves padding; [None] for all of them at once.

        An accelerator wants work in large pieces, and processes that wait for each other equally many of them.
        """
        if inputs["input_ids"].is_cuda or self.accelerator.num_processes > 1 or self.aux_loss_enabled:
            return [None]
        whole, responses = (inputs[name].sum(dim=1).view(2, -1) for name in ("attention_mask", "completion_mask"))
        found = layout.parts((whole[0] + responses[1]).tolist())
        return list(found) if len(found) > 1 else [None]

    def _rows(self, inputs: Mapping[str, Tensor]) -> layout.Rows:
        """A row for each pair, where both models give the same so; otherwise one for each response.

        Models that FSDP2 shares out keep a row for each response: with shared rows a training in bf16 that was gone on from
        ended with other bytes.
        """
        if self.is_fsdp_enabled:
            self._shares = False
        if self._shares is None:
            models = [
                bare(self.accelerator.unwrap_model(one)) for one in (self.model, self.ref_model) if one is not None
            ]
            alike = all(layout.may_share(one) and type(one) is type(models[0]) for one in models)
            # What a router is taught depends on how often it sees a prompt.
            self._shares = alike and not self.aux_loss_enabled and self._agrees_when_shared(layout.take(inputs, [0]))
        return (layout.shared if self._shares else layout.separate)(inputs)

    def _agrees_when_shared(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the model gives a pair in one row what it gives its two responses apart. A collective call."""
        exact = torch.autocast(inputs["input_ids"].device.type, enabled=False)
        apart, together = layout.separate(inputs), layout.shared(inputs)
        with self._as_it_is(), torch.no_grad(), exact:
            one, _ = self._forward(self.model, apart, lambda hidden, _: apart.at_responses(hidden).float())
            other, _ = self._forward(self.model, together, lambda hidden, _: together.at_responses(hidden).float())
        off = ((one - other).abs().max() > 1e-2 * one.abs().max()).float()
        if self.accelerator.num_processes > 1:
            off = self.accelerator.reduce(off, reduction="sum")
        return not bool(off)

    def _forward(self, model: Any, rows: layout.Rows, at_head: Any, router_logits: bool = False) -> Any:
        """What `at_head` gives, and the router's loss; see `head`."""
        kwargs = {"output_router_logits": True} if router_logits else {}
        return model(**rows.inputs, use_cache=False, at_head=at_head, **kwargs)

    def _reference(self, inputs: Mapping[str, Tensor], rows: layout.Rows) -> tuple[Tensor, head.Head]:
        """Hidden states (N, H) of the response tokens in the reference, and its head, without gradient."""
        if self.ref_model is None:
            # While the adapter is on: FSDP2 sees at its first forward what is trained, and in which dtype to reduce that.
            self._check_head(self.model, self.model, inputs)
        with self._as_reference() as model:
            if self.ref_model is not None:
                self._check_head(model, model, inputs)
            hidden, _ = self._forward(model, rows, lambda hidden, _: rows.at_responses(hidden))
            return hidden, head.read(bare(self.accelerator.unwrap_model(model)))

    def reference_logps(
        self, pairs: Dataset | None = None, on_batch: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities (nats, summed) of pairs in their order: chosen (n,), rejected (n,).

        `pairs`: rows of the training set, by default all of it.
        A collective call: every process gets all of them. `on_batch` is called after each batch.
        """
        parts: list[Tensor] = []
        for batch in self.get_eval_dataloader(self.train_dataset if pairs is None else pairs):
            batch = self._prepare_inputs(batch)
            rows = self._rows(batch)
            hidden, (weight, bias, logit_scale, softcap) = self._reference(batch, rows)
            with torch.no_grad(), self._autocast():
                logp = lean_logps(hidden, weight, rows.targets, bias=bias, logit_scale=logit_scale, softcap=softcap)
            logps = per_response(logp, rows.mask)
            parts.append(self.accelerator.gather_for_metrics(torch.stack(logps.chunk(2), dim=1)).cpu())
            on_batch()
        logps = torch.cat(parts)
        return logps[:, 0], logps[:, 1]


def bare(model: Any) -> Any:
    """The model itself, without an adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
