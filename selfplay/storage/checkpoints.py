"""Which files of a folder are the checkpoint. Check, import, downloads, manifests, swap and comparison all ask here.

A checkpoint is config.json and weights as safetensors: model.safetensors, or the shards that an index names. Libraries
differ in what else they read: vLLM takes every safetensors file, or `consolidated*` alone, and transformers puts an adapter
on top. So what lies beside a checkpoint is named here, with the reason why it is no part of it, and `linked` makes a folder
without it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.errors import CheckpointError
from selfplay.storage import folders, hashes
from selfplay.storage.beside import INDEX, SINGLE, printable, some, why_beside, without_weights
from selfplay.storage.tensors import FETCH_AGAIN, FETCH_LFS, TensorSpec, is_pointer, specs

MASTERS = "masters"  # folder in a checkpoint with the same in float32, from which training starts
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SMALL = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".py",
    ".tiktoken",
)  # suffixes of what belongs to a checkpoint beside its weights
TEMPLATES = "additional_chat_templates"
# What belongs to the tokenizer, the chat template and generation: never rewritten, only copied.
COMPANIONS = ("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model", "*.tiktoken",
              "chat_template*", f"{TEMPLATES}/*", "generation_config.json", "*.py")  # fmt: skip
OBJECTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)
NEVER_EMPTY = ("tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja")

CANNOT_MERGE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole model."""

    folder: Path
    weights: tuple[str, ...]
    """The files with its tensors."""
    tensors: Mapping[str, TensorSpec]
    beside: Mapping[str, str]
    """What another library might read in this folder, name → why it is no part of the model."""

    def files(self) -> list[str]:
        """All files of it, in order: weights, their index, and what belongs to configuration, tokenizer and templates."""
        names = [name for name in _names(self.folder) if Path(name).suffix in SMALL and name != folders.MANIFEST]
        return sorted({*self.weights, *names} - self.beside.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What was trained beside a base model, and is a model together with it alone."""

    folder: Path
    base: str
    """Folder or Hub id of the base, as the adapter names it."""
    revision: str | None
    kind: str  # LORA, …
    tensors: Mapping[str, TensorSpec]

    def base_folder(self) -> Path | None:
        """The folder of the base; None where it is on the Hub. Raises CheckpointError where it can be neither.

        A relative path starts at the adapter, or at the working directory.
        """
        for found in (self.folder / self.base, Path(self.base)):
            if found.is_dir():
                return found.resolve()
        if self.base.startswith((".", "/", "~")) or self.base.count("/") != 1:
            raise CheckpointError(
                f"{self.folder} is an adapter, and its base is missing: there is no folder {self.base}",
                f"put the base model there, or name its folder in base_model_name_or_path of {ADAPTER_CONFIG}",
            )
        return None


def look(folder: Path) -> Checkpoint | Adapter:
    """What a folder holds; raises CheckpointError for one that is no whole checkpoint, with what to do about it."""
    names = _names(folder)
    index = _index(folder) if INDEX in names and SINGLE not in names else {}
    if SINGLE in names:
        _require_one(folder, names)
        weights = [SINGLE]
    elif index:
        weights = sorted(set(index.values()))
        if missing := [name for name in weights if name not in names]:
            raise CheckpointError(
                f"{folder}: {INDEX} names {len(missing)} of {len(weights)} files that are not there: {some(missing)}",
                "copy or fetch these files too",
            )
    elif ADAPTER_CONFIG in names:
        return _adapter(folder, names)
    else:
        raise CheckpointError(*without_weights(str(folder), names, _below(folder)))
    _require_whole(folder, names, weights)
    if "config.json" not in names:
        raise CheckpointError(f"{folder} has weights, and no config.json", "copy the model's config.json there")
    tensors = _tensors(folder, weights, index)
    beside = {name: why for name in names if name not in weights and (why := why_beside(name, index)) is not None}
    return Checkpoint(folder=folder, weights=tuple(weights), tensors=tensors, beside=beside)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; raises CheckpointError as `look` does, and for an adapter."""
    found = look(folder)
    if isinstance(found, Adapter):
        raise CheckpointError(
            f"{folder} holds an adapter alone ({ADAPTER_CONFIG}), not a whole model",
            f"merge it with its base {found.base} first; policy.model alone takes an adapter as it is",
        )
    return found


def unmixed(folder: Path) -> Checkpoint:
    """The checkpoint in a folder that transformers reads as it is; raises CheckpointError as `read`, and for an adapter beside it.

    transformers would put the adapter on top of the model without a word.
    """
    found = read(folder)
    if ADAPTER_CONFIG in found.beside:
        raise CheckpointError(
            f"{folder} holds a model and an adapter beside it ({ADAPTER_CONFIG}), which would be put on top of the model",
            "move the adapter into a folder of its own, or merge the two",
        )
    return found


def require_plain(where: str, settings: Mapping[str, Any]) -> None:
    """Raise CheckpointError for quantised weights, which can be neither trained nor merged; `settings`: of config.json."""
    found = settings.get("quantization_config") or settings.get("compression_config")
    if found:
        how = found.get("quant_method") if isinstance(found, dict) else None
        raise CheckpointError(
            f"{where} has quantised weights ({printable(str(how or 'of an unknown kind'))}), which cannot be trained",
            "take the model that it was made from, or save it as plain numbers: model.dequantize(), then save_pretrained",
        )


def tensors(folder: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of all tensors of a checkpoint, from the headers of its files alone. Raises CheckpointError."""
    return dict(read(folder).tensors)


def hashed(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint that others made. Raises CheckpointError.

    A policy of another run is one too: its masters count, its manifest there does not.
    """
    names = read(folder).files()
    names += sorted(path.relative_to(folder).as_posix() for path in (folder / TEMPLATES).glob("*") if path.is_file())
    if (folder / MASTERS).is_dir():
        names += [f"{MASTERS}/{name}" for name in read(folder / MASTERS).files()]
    return dict(zip(names, hashes.sha256_of(folder / name for name in names), strict=True))


def linked(checkpoint: Checkpoint, out: Path) -> None:
    """Make the folder `out` of links to the files of a checkpoint, and to nothing that lies beside them; of copies where the
    file system has no symbolic links."""
    out.mkdir(parents=True)
    source = checkpoint.folder.resolve()
    below = [name for name in (TEMPLATES, MASTERS) if (source / name).is_dir()]
    for name in [*checkpoint.files(), *below]:
        try:
            (out / name).symlink_to(source / name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise
            copy: Callable[..., object] = shutil.copytree if (source / name).is_dir() else shutil.copyfile
            copy(source / name, out / name)


def companions(folder: Path) -> list[Path]:
    """The files of a checkpoint that belong to its tokenizer, its chat template and generation."""
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})


def copy_companions(source: Path, out: Path) -> None:
    """Copy what belongs to tokenizer, chat template and generation from one folder to another, over what is there."""
    for path in companions(source):
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def weights_on_hub(names: Collection[str]) -> bool:
    """Whether files of these names hold a model, as far as names can tell."""
    return SINGLE in names or INDEX in names


def to_fetch(folder: Path) -> list[str]:
    """Names of the files with weights that a model on the Hub may have, once its small files are in `folder`."""
    index = sorted(set(_index(folder).values())) if (folder / INDEX).is_file() else []
    return [SINGLE, ADAPTER, *(name for name in index if name not in (SINGLE, ADAPTER))]


# what a folder holds


def _names(folder: Path) -> list[str]:
    """The files of a folder, and its links, whether or not they lead anywhere."""
    if folder.is_file():
        gguf = ", and GGUF cannot be trained" if folder.suffix == ".gguf" else ""
        raise CheckpointError(
            f"{folder} is a file{gguf}", "give the folder that holds config.json and model.safetensors"
        )
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.name in (SINGLE, INDEX) or not Path(e.path).is_dir())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no such folder", "relative paths start at the working directory") from None
    except (OSError, ValueError) as error:  # a name with a NUL is a ValueError
        raise CheckpointError(f"{folder} cannot be read: {getattr(error, 'strerror', error)}") from None


def _below(folder: Path) -> list[str]:
    """Folders in a folder, or in its `snapshots` as the cache of the Hub has them, that look like checkpoints."""
    found = [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    return sorted(printable(path.parent.relative_to(folder).as_posix()) for path in found)


def _require_one(folder: Path, names: Collection[str]) -> None:
    """Raise CheckpointError where one file and an index with all its shards are both there: they are two saves."""
    try:
        shards = set(_index(folder).values()) if INDEX in names else set()
    except CheckpointError:
        return  # nothing could be read by this index
    if shards > {SINGLE} or (shards and SINGLE not in shards and all(name in names for name in shards)):
        raise CheckpointError(
            f"{folder} holds two saves: {SINGLE}, and {len(shards)} other files that {INDEX} names ({some(sorted(shards))})",
            f"remove the older one: {SINGLE}, or {INDEX} with its files",
        )


def _require_whole(folder: Path, names: Iterable[str], weights: Collection[str]) -> None:
    """Raise CheckpointError for a link that leads nowhere, a Git LFS pointer, and a settings file that cannot be read."""
    for name in names:
        path = folder / name
        if name not in weights and (path.suffix not in SMALL or why_beside(name, {}) is not None):
            continue
        if not path.exists():
            raise CheckpointError(
                f"{path} is a link to {printable(os.readlink(path))}, which is not there",
                "copy or fetch the file again; a copy of a folder of the Hub's cache has to follow its links (cp -rL)",
            )
        if name in weights:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is no file", FETCH_AGAIN)
        try:
            if is_pointer(path):
                raise CheckpointError(f"{path} is a Git LFS pointer, not the file", FETCH_LFS)
            if name in NEVER_EMPTY and not path.stat().st_size:
                raise CheckpointError(f"{path} is empty (0 bytes)", FETCH_AGAIN)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        if name in OBJECTS:
            _object(path)


def _object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises CheckpointError for any other."""
    if not path.is_file():
        what = f"a link to {printable(os.readlink(path))}, which is not there" if path.is_symlink() else "no file"
        raise CheckpointError(f"{path} is {what}", FETCH_AGAIN)
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if path.stat().st_size and is_pointer(path):
            raise CheckpointError(f"{path} is a Git LFS pointer, not the file", FETCH_LFS) from None
        why = f"it is no JSON ({error})" if path.stat().st_size else "it is empty (0 bytes)"
        raise CheckpointError(f"{path} cannot be read: {why}", FETCH_AGAIN) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: it is no JSON object", FETCH_AGAIN)
    return found


def _index(folder: Path) -> dict[str, str]:
    """Tensor → file of an index; raises CheckpointError for one that cannot be used."""
    path = folder / INDEX
    found = _object(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path} has no weight_map", FETCH_AGAIN)
    for file in found.values():
        if not isinstance(file, str) or "/" in file or "\0" in file or not file.endswith(".safetensors"):
            hint = "an index names safetensors files beside it; save the model again with save_pretrained"
            raise CheckpointError(f"{path} names {printable(str(file))!r}, which is no file beside it", hint)
    return found


def _tensors(folder: Path, weights: Iterable[str], index: Mapping[str, str]) -> dict[str, TensorSpec]:
    """All tensors; raises CheckpointError where the files are not what the index says, or hold a tensor twice."""
    found: dict[str, TensorSpec] = {}
    at: dict[str, str] = {}
    for name in weights:
        for tensor, spec in specs(folder / name).items():
            if tensor in found:
                raise CheckpointError(
                    f"{folder}: {printable(tensor)} is in two files, {at[tensor]} and {name}: they are of two saves",
                    "copy or fetch all files of one save",
                )
            found[tensor], at[tensor] = spec, name
    if not found:
        raise CheckpointError(f"{folder}: {some(weights)} holds no tensors", FETCH_AGAIN)
    if lacking := sorted(tensor for tensor, name in index.items() if at.get(tensor) != name):
        raise CheckpointError(
            f"{folder}: {INDEX} has {len(lacking)} tensors in files that lack them: {some(lacking)}",
            "copy or fetch all files of one save",
        )
    return found


def _adapter(folder: Path, names: Collection[str]) -> Adapter:
    settings = _object(folder / ADAPTER_CONFIG)
    if ADAPTER not in names:
        what = (
            "its weights are pickled, which are never loaded"
            if "adapter_model.bin" in names
            else f"it has no {ADAPTER}"
        )
        raise CheckpointError(f"{folder} is an adapter, and {what}", "save the adapter as safetensors")
    _require_whole(folder, [name for name in names if name != ADAPTER_CONFIG], ())
    base, kind, revision = (settings.get(key) for key in ("base_model_name_or_path", "peft_type", "revision"))
    if not isinstance(base, str) or not base or "\0" in base:
        raise CheckpointError(
            f"{folder} is an adapter that does not name its base",
            f"name it in base_model_name_or_path of {ADAPTER_CONFIG}",
        )
    if not isinstance(kind, str) or kind.upper() in CANNOT_MERGE:
        raise CheckpointError(
            f"{folder} is an adapter of the kind {kind}, which cannot be merged with its base",
            "take one of the kind LORA",
        )
    if not (folder / ADAPTER).exists():
        raise CheckpointError(f"{folder / ADAPTER} is a link to nothing", "copy or fetch the file again")
    found = specs(folder / ADAPTER)
    if not found:
        raise CheckpointError(f"{folder / ADAPTER} holds no tensors", FETCH_AGAIN)
    given = revision if isinstance(revision, str) and revision else None
    return Adapter(folder=folder, base=base, revision=given, kind=kind, tensors=found)
