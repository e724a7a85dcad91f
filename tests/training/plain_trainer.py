"""The trainer of ε-DPO with the whole logits of policy and reference, term by term as the formulas read."""

from typing import Any

import torch
from torch import Tensor

from selfplay.methods.epsilon_dpo import chosen_logps, epsilon_steps, pair_betas, pair_losses
from selfplay.training.epsilon_dpo import EpsilonDPOTrainer


class PlainEpsilonDPOTrainer(EpsilonDPOTrainer):
    """EpsilonDPOTrainer with another `_compute_loss`: both models' logits of all response tokens at once."""

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Tensor:
        mask = inputs["completion_mask"][:, 1:].bool()
        first = int(mask.any(dim=0).int().argmax())  # prompt positions before any response get no logits
        mask = mask[:, first:]
        targets = inputs["input_ids"][:, first + 1 :][mask]

        def logits(one: Any) -> Tensor:
            outputs = one(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False,
                logits_to_keep=mask.size(1) + 1,
            )  # fmt: skip
            return outputs.logits[:, :-1][mask]

        def per_response(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)

        def q(logp: Tensor) -> Tensor:
            chosen, rejected = per_response(logp).chunk(2)
            return chosen - rejected

        z = logits(model)
        with torch.no_grad(), self._as_reference() as reference:
            z_ref = logits(reference)
        logp, ref_logp = chosen_logps(z, targets), chosen_logps(z_ref, targets)
        epsilon = self.args.epsilon
        with torch.no_grad():
            shift = epsilon * (z.float() - z_ref.float())  # not `perturbed`: its rounding shows where both agree
            plus, minus = (chosen_logps(z.float() + sign * shift, targets) for sign in (1, -1))
            steps = epsilon_steps(torch.zeros(len(mask) // 2), q(plus - logp), q(minus - logp))
        losses = pair_losses(q(logp - ref_logp), pair_betas(self.beta, steps, epsilon), self.args.label_smoothing)
        zeros, ones = torch.zeros(len(mask)), torch.ones(len(steps))
        self._count(steps, ones, losses.detach(), per_response(logp.detach()), zeros, zeros[: len(steps)], zeros)
        return losses.mean()
