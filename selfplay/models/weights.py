"""Checkpoints of the trainer: load them strictly, write a policy that a generator can serve, measure what changed.

A policy folder is a plain Hugging Face checkpoint in the serving dtype; where that is not float32, its `masters/` is
the same checkpoint in float32, from which the next round trains: a small learning rate vanishes in bf16 weights.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from selfplay.errors import CheckpointError, TrainError
from selfplay.methods.epsilon_dpo import chosen_logps
from selfplay.models import streamed
from selfplay.planning.memory import BF16
from selfplay.planning.shapes import from_config
from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import MASTERS

logger = logging.getLogger(__name__)

PART = 256 << 20  # Bytes of a model that is read in parts that stay in the main memory.
SPARED = 0.8  # The share of a GPU's free memory that its weights may take.


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the host or the device ran out of memory."""
    told = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error).lower() for words in told)


def free_memory() -> int | None:
    """Bytes that this process could take on its GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def require_memory(policy: Any, reference: Any = None, *, of_policy: int = 1, processes: int = 1) -> None:
    """Raise TrainError («oom») where the GPU lacks what is to be kept on it, activations apart.

    `of_policy`: how many times the policy's size; 4 where all weights are trained, each with a gradient and AdamW's two
    moments. Of `processes` that shard the models each is asked for its share, and for what it gathers at a time.
    """
    held = [
        sum(p.numel() * p.element_size() for p in m.parameters()) if m is not None else 0 for m in (policy, reference)
    ]
    needed = (held[0] * of_policy + held[1]) // processes + (_gathered(policy) if processes > 1 else 0)
    free = free_memory()
    if free is not None and free < needed:
        raise TrainError(
            "oom",
            f"out of memory: the GPU has {free / 2**30:.1f} GiB free, and weights{', gradients and optimizer' * (of_policy > 1)} "
            f"alone take {needed / 2**30:.1f} GiB",
            "see in nvidia-smi what else holds its memory, set train.lora, or give the trainer GPUs of its own (placement) "
            "and more of them (train.accelerate)",
        )


def _gathered(model: Any) -> int:
    """Bytes of what FSDP2 has whole on a GPU while it works, in bf16 at least: two layers, and the embeddings."""
    shape = from_config(model.config.to_dict(), sum(p.numel() for p in model.parameters()))
    return 0 if shape is None else int(2 * shape.layer + shape.embeddings) * BF16


def masters(policy: Path) -> Path:
    """The folder with the float32 weights of a policy: its masters, or itself."""
    return policy / MASTERS if (policy / MASTERS).is_dir() else policy


def load(
    folder: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, trust_remote_code: bool = False, **how: Any
) -> Any:
    """The causal language model of a checkpoint folder, in `dtype`, on the CPU. «auto» is the dtype of its files.

    In the dtype of its files a model stays on the disk, and is read when somebody looks at it. how: further settings of
    transformers. Raises TrainError («input») for a folder that is not a whole checkpoint: missing, truncated or mis-shaped tensors.
    """
    hint = "check the folder against its manifest, or take the policy before it"
    try:
        checkpoints.read(folder)
    except CheckpointError as error:
        raise TrainError("input", f"{folder} holds no checkpoint: {error}", error.hint or hint) from error
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **how,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise TrainError("input", f"{folder} cannot be loaded: {error}", hint) from error
    if bad := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
        raise TrainError("input", f"{folder} lacks {len(bad)} tensors of its model, or has them in another shape: "
                         f"{', '.join(bad[:3])}", hint)  # fmt: skip
    if report["unexpected_keys"]:
        logger.warning("%s: tensors that the model does not have: %s", folder, sorted(report["unexpected_keys"])[:10])
    return model


def load_in_parts(
    folder: Path, dtype: torch.dtype, device: torch.device, beside: Path, trust_remote_code: bool = False
) -> Any:
    """The same to be used on `device`, which gets as much of it as it has room for. The rest comes from the disk, layer by layer.

    So it may be larger than the memory of the device and of the host. `beside`: an empty folder, for what is not in `dtype` on the
    disk. Raises as `load`.
    """
    free = free_memory()
    room: dict[int | str, int] = {"cpu": PART} | ({} if free is None else {device.index or 0: int(free * SPARED)})
    return load(folder, dtype, trust_remote_code, device_map="auto", max_memory=room, offload_folder=beside)


def export(model: Any, config_from: Path, initial: Path, out: Path, dtype: torch.dtype) -> None:
    """Write `model` (float32, plain) as a policy to `out`, with masters unless `dtype` is float32. Converts the model.

    The config is that of `config_from` with another dtype: the one in memory has seen the trainer's changes. Tokenizer,
    chat template and generation config are the bytes of `initial`.
    """
    if dtype != torch.float32:
        _write(model, config_from, initial, out / MASTERS, torch.float32)
    _write(model, config_from, initial, out, dtype)


def _write(model: Any, config_from: Path, initial: Path, out: Path, dtype: torch.dtype) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(out, max_shard_size=streamed.LARGEST)
    complete(config_from, initial, out, dtype)


def complete(config_from: Path, initial: Path, out: Path, dtype: torch.dtype) -> None:
    """Put what belongs to a policy beside its weights, in place of what transformers wrote there."""
    config = json.loads((config_from / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for written in out.glob("*.safetensors"):  # by their owner alone, unlike all else: another user may serve them
        shutil.copymode(out / "config.json", written)
    for stale in checkpoints.companions(out):
        stale.unlink()
    checkpoints.copy_companions(initial, out)


@torch.no_grad()
def update_size(start: Any, final: Any) -> tuple[float, float]:
    """Share of changed elements and relative norm ‖Δ‖/‖start‖ of the update, over the parameters, in float32.

    Raises TrainError (kind «input») where the two models have other parameters.
    """
    after = dict(final.named_parameters())
    changed = elements = 0
    delta_square = start_square = 0.0
    for name, a in start.named_parameters():
        if name not in after or after[name].shape != a.shape:
            raise TrainError("input", f"the trained model has no {name} of shape {tuple(a.shape)}")
        a, b = a.detach().float(), after[name].detach().to(a.device).float()
        changed += int((a != b).sum())
        elements += a.numel()
        delta_square += float((b - a).norm()) ** 2
        start_square += float(a.norm()) ** 2
    return changed / elements, (delta_square / start_square) ** 0.5


@torch.no_grad()
def sequence_logps(model: Any, sequences: Sequence[Sequence[int]], device: torch.device | None = None) -> list[float]:
    """Summed log-probability (nats) of each sequence's tokens from the second on, log-softmax in float32.

    device: where it computes, for a model that does not hold its weights. One sequence at a time: padding would change the last digits.
    """
    logps: list[float] = []
    for ids in sequences:
        tokens: Tensor = torch.tensor([list(ids)], device=device or model.device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
        logps.append(float(chosen_logps(logits, tokens[0, 1:]).sum()))
    return logps
