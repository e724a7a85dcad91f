"""Adapters of PEFT: merged into their model, after training and when a run begins with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file

from selfplay.errors import InputError
from selfplay.models import weights
from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import Adapter

NAME = "default"  # PEFT's name of an adapter, which is a part of the names of its parameters


def merged(model: Any) -> Any:
    """The plain model with its adapter in its weights, in the precision of `model`, which is used up."""
    return model.merge_and_unload()


def merge(
    adapter: Adapter, base: Path, companions: Path, out: Path, dtype: torch.dtype, trust_remote_code: bool
) -> None:
    """Write an adapter, merged with its base in float32, as a policy to `out`, as the trainer writes one.

    companions: the folder with tokenizer and chat template. Raises InputError for an adapter that does not fit its base,
    TrainError for a base that cannot be loaded.
    """
    model = weights.load(base, torch.float32, trust_remote_code)
    hint = f"name the base that the adapter was trained on in base_model_name_or_path of {checkpoints.ADAPTER_CONFIG}"
    try:
        # The configuration as it was saved names modules; nothing in it loads code or weights.
        with_adapter = get_peft_model(model, PeftConfig.from_pretrained(str(adapter.folder)), adapter_name=NAME)
        found = set_peft_model_state_dict(with_adapter, load_file(adapter.folder / checkpoints.ADAPTER), NAME)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
        OSError,
        ImportError,
        SafetensorError,
    ) as error:
        if weights.out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise InputError(f"the adapter {adapter.folder} does not fit its base {base}: {said}", hint) from error
    missing = [name for name in found.missing_keys if f".{NAME}." in name]
    if wrong := sorted([*found.unexpected_keys, *missing]):
        raise InputError(
            f"the adapter {adapter.folder} does not fit its base {base}: {len(wrong)} tensors are missing or have no place, "
            f"as {wrong[0]}",
            hint,
        )
    weights.export(merged(with_adapter), base, companions, out, dtype)


def leave_dtypes(model: Any) -> None:
    """Have the layers of an adapter take their inputs as they are, where autocast makes the products in one dtype anyway.

    PEFT casts them to the dtype of the adapter before, float32, and autocast casts the result back: the same numbers twice.
    """
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False
