"""Two processes share models by FSDP2, and export them; rank 0 compares the files with those of the whole model's export.

`torchrun --nproc_per_node 2 tests/sharded_world.py FOLDER`
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from selfplay.models import adapters, gathered, sharded, streamed, weights  # noqa: E402

SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
KINDS: dict[str, Any] = {  # numbers of rows that two processes do not share evenly, too
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "adapter": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)),
    "experts": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3)),  # stored in another form
}


def trained(start: Path, kind: str) -> Any:
    """The model of a checkpoint with other weights, the same in each process."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    torch.manual_seed(1)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind != "adapter" or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def share(model: Any) -> Any:
    for layer in (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers:
        fully_shard(layer)
    return fully_shard(model)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    distributed.init_process_group("gloo")
    rank, root = distributed.get_rank(), Path(sys.argv[1])
    gathered.BLOCK, streamed.LARGEST = 1000, "15KB"  # many blocks, and several files
    for kind, build in KINDS.items():
        start = root / kind / "start"
        if rank == 0:
            torch.manual_seed(0)
            build().save_pretrained(start)
        distributed.barrier()
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = (root / kind / f"{dtype}-{name}" for name in ("sharded", "whole"))
            model = share(trained(start, kind))
            assert all(isinstance(each, DTensor) for each in model.parameters())
            adapter = sharded.adapter(model)
            if rank:
                assert sharded.export(model, None, start, start, None, dtype) is None
                continue
            before = weights.load(start, "auto")
            update = sharded.export(model, before, start, start, ours, dtype)
            whole = trained(start, kind)
            if kind == "adapter":
                state = {name: each for name, each in whole.state_dict().items() if "lora_" in name}
                assert adapter.keys() == state.keys() and all(torch.equal(adapter[name], state[name]) for name in state)
                whole = adapters.merged(whole)
            expected = weights.update_size(before, whole)
            assert update is not None and update[0] == expected[0] and abs(update[1] / expected[1] - 1) < 1e-6
            weights.export(whole, start, start, theirs, dtype)
            found, wanted = bytes_of(ours), bytes_of(theirs)
            assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
            assert not (other := [name for name in wanted if found[name] != wanted[name]]), other
            assert len(list(ours.glob("*.safetensors"))) > 1, "several files and an index"
    distributed.barrier()
    if rank == 0:
        print("the same files", flush=True)
    os._exit(0)  # a usual exit may destroy gloo's threads while they run, and abort


if __name__ == "__main__":
    main()
