"""FSDP2 as the trainer needs it, where accelerate's and TRL's own ways are not right for it."""

import dataclasses
import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model


def is_sharded() -> bool:
    """Whether the launcher was told to spread models over the processes."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def prepare(accelerator: Accelerator, reference: Any) -> None:
    """Set how the policy will be sharded, and shard `reference`, in place, where there is one. A call of all processes.

    - Products are made in the dtype of the mixed precision. Gradients are added up over the processes in float32, and
      what a model gives stays as it is: the loss is made inside the forward, and accelerate's policy would round its
      log-probabilities to bfloat16.
    - Each micro-batch leaves its gradients sharded. Otherwise every process would hold those of the whole model, in
      bfloat16, until the last micro-batch of a step.
    - The reference is sharded layer by layer and gets the weights of rank 0, as the policy does. TRL's own way makes one
      unit of it, and on the other ranks it keeps what they hold, which is zeros after a load on rank 0 alone.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(
            plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
        )
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if reference is not None:
        fsdp2_prepare_model(accelerator, reference).eval()
