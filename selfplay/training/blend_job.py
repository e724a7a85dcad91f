"""The order `blend` of the trainer child: a reference that has moved towards a policy (`train.reference: {ema: …}`)."""

from __future__ import annotations

from typing import Any

import torch

from selfplay.errors import TrainError
from selfplay.methods.moving_average import follow
from selfplay.models import weights
from selfplay.models.kept import Kept
from selfplay.storage import folders
from selfplay.training.jobs import BlendJob


@torch.no_grad()
def blend(job: BlendJob, kept: Kept) -> dict[str, Any]:
    """Write the moving average as a checkpoint in float32; it appears whole or not at all. Raises TrainError.

    The result: `distance`, ‖reference − policy‖ / ‖policy‖ over the parameters.
    """
    model = kept.own(weights.masters(job.policy), job.trust_remote_code)
    before = dict(kept.shared(weights.masters(job.before), job.trust_remote_code).named_parameters())
    distance = size = 0.0
    for name, parameter in model.named_parameters():
        if name not in before or before[name].shape != parameter.shape:
            raise TrainError(
                "input",
                f"the reference of before has no {name} of shape {tuple(parameter.shape)}",
                "it is of another model: delete the folder references of the run, and the average begins anew",
            )
        moved = follow(before[name], parameter, job.share)
        distance += float((moved - parameter).norm()) ** 2
        size += float(parameter.norm()) ** 2
        parameter.copy_(moved)
    with folders.folder(job.out) as part:
        weights.export(model, job.policy, job.initial, part, torch.float32)
    return {"distance": (distance / size) ** 0.5 if size else 0.0}
