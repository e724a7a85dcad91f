"""The trainer child with FSDP2 on a CPU, behind accelerate's launcher; after each micro-batch it looks at what is held.

accelerate makes FSDP of several processes on GPUs only. That one condition is lifted here; all else is as on GPUs.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from selfplay.training import trainer  # noqa: E402
from selfplay.training.epsilon_dpo import EpsilonDPOTrainer  # noqa: E402

init, training_step = AcceleratorState.__init__, EpsilonDPOTrainer.training_step


def init_on_cpu(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def checked_step(self: EpsilonDPOTrainer, model: Any, *args: Any) -> torch.Tensor:
    loss = training_step(self, model, *args)
    units = [sum(isinstance(m, FSDPModule) for m in one.modules()) for one in (model, self.ref_model or model)]
    assert min(units) > model.config.num_hidden_layers, f"units of policy and reference: {units}"
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(isinstance(g, DTensor) and g.dtype == torch.float32 for g in gradients), "gradients stay sharded"
    timeout = distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert timeout >= timedelta(hours=1), f"a save may take longer than {timeout}"
    return loss


AcceleratorState.__init__ = init_on_cpu
EpsilonDPOTrainer.training_step = checked_step

if __name__ == "__main__":
    trainer.main()
