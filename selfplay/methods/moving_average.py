"""A reference that follows the policy as a moving average.

TR-DPO (Gorbatovski et al., 2024, arXiv 2404.09656) calls it the soft update: π_ref ← α · π_θ + (1 − α) · π_ref, on the weights.
The formula is as TRL documents it for `ref_model_mixup_alpha`, whose default is α = 0.6; the paper's text could not be had. Their
update comes every few optimizer steps. Here it comes once a round, with the policy that samples the round, because a reference
that moved within a round would not be the one that the agreement check and the manifest name.
"""

from __future__ import annotations

import torch
from torch import Tensor


def follow(reference: Tensor, policy: Tensor, share: float) -> Tensor:
    """share · policy + (1 − share) · reference, element by element, in float32; both tensors have one shape."""
    return torch.lerp(reference.float(), policy.float(), share)
