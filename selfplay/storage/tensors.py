"""Names, dtypes and shapes of the tensors in a safetensors file, from its header alone."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfplay.errors import CheckpointError

TensorSpec = tuple[str, tuple[int, ...]]  # dtype as safetensors names it, shape

POINTER = (
    b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins, which stands where its file should be
)
FETCH_LFS = "fetch the files that the pointers stand for: git lfs pull"
FETCH_AGAIN = "copy or fetch the file again: it is not whole"
LARGEST_HEADER = 32 << 20  # In bytes. A tensor takes about a hundred, and large models have a hundred thousand tensors.


def specs(file: Path) -> dict[str, TensorSpec]:
    """The dtype and the shape of each tensor in a file; raises CheckpointError for one that is damaged or something else."""
    if file.is_dir():
        raise CheckpointError(
            f"{file} cannot be read: Is a directory", "remove it, and put the file with the weights there"
        )
    if not file.is_file():
        raise CheckpointError(f"{file} is no file", "put the file with the weights there")
    try:
        bound_header(file)
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise _damage(file, str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


def bound_header(file: Path) -> None:
    """Raise CheckpointError where the header is larger than that of any model. It is read and parsed as a whole."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if LARGEST_HEADER < length <= file.stat().st_size - 8:  # A header that is longer than the file is named as damage.
        raise CheckpointError(
            f"{file} is no file of weights: its header has {length} bytes, and none needs more than {LARGEST_HEADER}",
            "fetch the file from where you know that it is right",
        )


def is_pointer(file: Path) -> bool:
    """Whether a file is a Git LFS pointer."""
    with file.open("rb") as stream:
        return stream.read(len(POINTER)) == POINTER


def _damage(file: Path, said: str) -> CheckpointError:
    """What is wrong with a file that safetensors cannot open."""
    size = file.stat().st_size
    if not size:
        return CheckpointError(f"{file} is empty (0 bytes)", FETCH_AGAIN)
    if is_pointer(file):
        return CheckpointError(f"{file} is a Git LFS pointer, not the weights", FETCH_LFS)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            return CheckpointError(
                f"{file} is damaged: its header is longer than the file ({length} bytes of {size})", FETCH_AGAIN
            )
        header = stream.read(length)
    try:
        end = (
            8
            + length
            + max(spec["data_offsets"][1] for name, spec in json.loads(header).items() if name != "__metadata__")
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        end = size
    if end != size:
        return CheckpointError(f"{file} is damaged: it has {size} bytes, its header says {end}", FETCH_AGAIN)
    return CheckpointError(f"{file} is damaged, or no safetensors file: {said}", FETCH_AGAIN)
