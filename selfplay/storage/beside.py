"""Files that are no weights of a checkpoint, by their names: what they are, and what to do where there is nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatch

from selfplay.storage.tensors import FETCH_AGAIN

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

PICKLED = "pickled weights are never loaded"
BESIDE = {
    "consolidated*": "weights under the names of Mistral or Meta",
    "params.json": "the settings of weights under the names of Mistral or Meta",
    "adapter_*": "an adapter, which is not merged into the model",
    "*.safetensors.index.json": "an index of files that are not read",
    "*.safetensors": "no part of the model's weights",
    "*.gguf": "weights of llama.cpp",
    "*.onnx": "a graph for another runtime",
} | dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack"), PICKLED)
"""Patterns of files that another library might read, and what they are. The first that fits counts."""

_CONVERT = "take the model in the format of Hugging Face (model.safetensors), or convert it"
NO_WEIGHTS = {
    "consolidated*": ("it holds weights under the names of Mistral or Meta alone ({})", _CONVERT),
    "*.gguf": ("it holds GGUF alone ({}), which cannot be trained", "take the model that the GGUF was made from, with model.safetensors"),
    "model-*-of-*.safetensors": (f"it holds shards without their index {INDEX} ({{}})", FETCH_AGAIN.replace("the file", "the index")),
    "*.safetensors": (f"none of its safetensors files ({{}}) is {SINGLE}, and there is no {INDEX}", f"if one is the whole model, name it {SINGLE}"),
    "*.bin": (f"it holds {{}}: {PICKLED}", "save it as safetensors: model.save_pretrained(folder)"),
    "*.pt": (f"it holds {{}}: {PICKLED}", "save it as safetensors: model.save_pretrained(folder)"),
    "*.pth": (f"it holds {{}}: {PICKLED}", _CONVERT),
    "*.ckpt": (f"it holds {{}}: {PICKLED}", _CONVERT),
    "*.h5": ("it holds weights of TensorFlow ({})", _CONVERT),
    "*.msgpack": ("it holds weights of Flax ({})", _CONVERT),
}  # fmt: skip
"""What a folder without usable weights holds instead, and what to do about it. The first that fits counts."""


def without_weights(where: str, names: Collection[str], below: Collection[str] = ()) -> tuple[str, str]:
    """Why a folder, or a model on the Hub, with files of these names has no weights for us, and what to do about it."""
    for pattern, (what, hint) in NO_WEIGHTS.items():
        if found := sorted(name for name in names if fnmatch(name, pattern)):
            return f"{where} has no safetensors file that is a model: {what.format(some(found))}", hint
    hint = "give the folder that holds config.json and model.safetensors"
    return f"{where} has no safetensors file", f"{hint}; {some(below)} in it looks like one" if below else hint


def why_beside(name: str, index: Mapping[str, str]) -> str | None:
    """What a file is that another library might read, and is no part of the model; None for any other."""
    if name == INDEX and index:
        return None
    return next((why for pattern, why in BESIDE.items() if fnmatch(name, pattern)), None)


def some(names: Iterable[str]) -> str:
    found = [printable(name) for name in names]
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def printable(name: str) -> str:
    """A name without the lone surrogates that stand for bytes which are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
