"""The files of a checkpoint written piece by piece, with the names and the bytes that transformers gives a whole model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save
from torch import Tensor

from selfplay.storage import folders
from selfplay.storage.beside import INDEX

LARGEST = "50GB"  # Of a file, as transformers has it. A larger model is several files and an index.


class StreamedFiles:
    """The safetensors files of one checkpoint, and their index where there are several."""

    def __init__(self, out: Path, tensors: Mapping[str, Tensor], parameters: int) -> None:
        """tensors: all that will be written, in the order of the model, without their numbers. Those that are views of one storage
        there lie in one file. parameters: the elements of the model, which an index tells."""
        self._files: list[int] = []
        self._at: dict[str, tuple[int, int, Tensor]] = {}
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: (
                tensor.untyped_storage()._cdata
            ),  # on the device «meta» no tensor has an address
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=LARGEST,
        )
        out.mkdir(parents=True, exist_ok=True)
        for file, names in split.filename_to_tensors.items():
            self._begin(out / file, {name: tensors[name] for name in names})
        if split.is_sharded:
            told = {"total_parameters": parameters, **split.metadata}
            text = json.dumps({"metadata": told, "weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
            (out / INDEX).write_text(text + "\n", encoding="utf-8")

    def write(self, name: str, row: int, block: Tensor) -> None:
        """Write some rows of a tensor, from `row` on, in its dtype. A tensor without dimensions is one row."""
        file, start, spec = self._at[name]
        row_bytes = spec.nbytes // max(1, spec.shape[0]) if spec.dim() else spec.nbytes
        data = block.to(spec.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        left, at = memoryview(data), start + row * row_bytes
        while left:
            written = os.pwrite(file, left, at)
            left, at = left[written:], at + written

    def __enter__(self) -> StreamedFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            os.close(file)

    def _begin(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        # The order, and what dtypes are called, as safetensors itself writes them.
        empty = save({name: torch.empty(0, dtype=each.dtype) for name, each in tensors.items()}, {"format": "pt"})
        length = int.from_bytes(empty[:8], "little")
        header, end = json.loads(empty[8 : 8 + length]), 0
        for name in [each for each in header if each != "__metadata__"]:
            begin, end = end, end + tensors[name].nbytes
            header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with folders.disk_errors(path):
            file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
            self._files.append(file)
            os.pwrite(file, len(text).to_bytes(8, "little") + text, 0)
            os.truncate(file, 8 + len(text) + end)
        for name in tensors:
            self._at[name] = file, 8 + len(text) + header[name]["data_offsets"][0], tensors[name]
