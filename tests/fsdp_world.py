"""Two processes shard a policy and its reference as accelerate does with FSDP2, and compare the gradients of ε-DPO's
log-probabilities, read before the head, with those of one process: `torchrun --nproc_per_node 2 tests/fsdp_world.py`."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "methods")]

from test_head import WORDS, build  # noqa: E402

from selfplay.methods import head  # noqa: E402
from selfplay.methods.epsilon_dpo import fused_logps  # noqa: E402


def shard(model: Any, tied: bool) -> Any:
    """Decoder layers, embeddings, [norm, head] and the rest, each a unit; tied embeddings join the head's."""
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=True)
    tail: list[nn.Module] = [model.model.norm, model.lm_head]
    if tied:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, reshard_after_forward=True)
    fully_shard(tail, reshard_after_forward=False)
    return fully_shard(model)


def logp_of(policy: Any, reference: Any, ids: torch.Tensor) -> torch.Tensor:
    """log π + (log π⁺ − log π⁻, which shows that the reference was read rightly), summed over the next tokens."""
    targets = ids[:, 1:].reshape(-1)

    def flat(hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :-1].reshape(-1, hidden.size(-1))

    with torch.no_grad():
        ref_hidden, _ = reference(input_ids=ids, use_cache=False, at_head=lambda hidden, _: flat(hidden))
        ref = head.read(reference)

    def at_head(hidden: torch.Tensor, own: head.Head) -> Any:
        assert not isinstance(own.weight, DTensor) and not isinstance(ref.weight, DTensor)
        return fused_logps(flat(hidden), own.weight, ref_hidden, ref.weight, targets, 0.1)

    (logp, _, plus, minus), _ = policy(input_ids=ids, use_cache=False, at_head=at_head)
    return logp.sum() + (plus - minus).sum()


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    batches = torch.arange(32).view(2, 2, 8) % (WORDS - 3) + 3
    for tied in (False, True):
        whole, reference = (build("Llama", tie_word_embeddings=tied) for _ in range(2))
        sharded, sharded_reference = (build("Llama", tie_word_embeddings=tied) for _ in range(2))
        for one in (reference, sharded_reference):
            one.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
        for one in (whole, reference, sharded, sharded_reference):
            head.make_lean(one)
        shard(sharded, tied)
        shard(sharded_reference, tied)
        torch.testing.assert_close(head.read(sharded).weight, whole.lm_head.weight.detach(), rtol=0, atol=0)
        assert head.agrees(sharded, batches[0, :1]) and head.agrees(sharded_reference, batches[0, :1])
        for _ in range(2):  # a second pass finds the units as the first one left them
            (sum(logp_of(whole, reference, batch) for batch in batches) / 2).backward()
            ours = logp_of(sharded, sharded_reference, batches[rank])
            torch.testing.assert_close(ours, logp_of(whole, reference, batches[rank]), rtol=1e-5, atol=1e-5)
            ours.backward()
            gathered = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
            for name, parameter in whole.named_parameters():
                torch.testing.assert_close(gathered[name], parameter.grad, rtol=1e-4, atol=1e-5)
    distributed.barrier()
    if rank == 0:
        print("the sharded gradients are those of one process", flush=True)
    os._exit(0)  # a usual exit may destroy gloo's threads while they run, and abort


if __name__ == "__main__":
    main()
