"""Which files of a folder are the checkpoint: folders as people have them, of tiny real safetensors files."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from selfplay.errors import CheckpointError
from selfplay.storage import checkpoints
from selfplay.storage.checkpoints import Adapter, Checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 3412560\n"
TENSORS = {name: np.full((2, 3), i, "float32") for i, name in enumerate("abcd")}
NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def base(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": null}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def single(folder: Path) -> Path:
    save_file(TENSORS, base(folder) / "model.safetensors")
    return folder


def shard(folder: Path, names: tuple[str, ...] = NAMES, scale: float = 1) -> Path:
    """The same tensors in shards, with an index."""
    parts = [list(TENSORS)[i :: len(names)] for i in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        save_file({n: TENSORS[n] * np.float32(scale) for n in part}, folder / name)
    at = {n: name for name, part in zip(names, parts, strict=True) for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": at}))
    return folder


def sharded(folder: Path) -> Path:
    return shard(base(folder))


def adapter(folder: Path, of: str, **more: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"peft_type": "LORA", "base_model_name_or_path": of} | more
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file({"base_model.model.a.lora_A.weight": np.zeros((1, 3), "float32")}, folder / "adapter_model.safetensors")
    return folder


def other(folder: Path, name: str) -> None:
    """Another safetensors file, with tensors of its own names."""
    save_file({"layers.0.attention.wq.weight": np.zeros((2, 3), "float32")}, folder / name)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoints.look(folder)
    assert error.value.hint, "it says what to do"
    for word in words:
        assert word in str(error.value), str(error.value)


def test_one_file_shards_and_what_lies_beside_them(tmp_path, monkeypatch):
    one = checkpoints.read(single(tmp_path / "one"))
    assert (one.weights, dict(one.beside)) == (("model.safetensors",), {})
    assert one.files() == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    many = checkpoints.read(sharded(tmp_path / "many"))
    assert many.weights == NAMES and not many.beside
    assert one.tensors == many.tensors == dict.fromkeys(TENSORS, ("F32", (2, 3)))
    for folder, weights in ((tmp_path / "one", one.weights), (tmp_path / "many", many.weights)):
        other(folder, "consolidated.safetensors")
        (folder / "params.json").write_text("{}")
        adapter(folder, str(folder))
        other(folder, "optimizer.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"pickled")
        (folder / "model-q4.gguf").write_bytes(b"GGUF")
        found = checkpoints.read(folder)
        assert found.weights == weights and len(found.tensors) == len(TENSORS)
        assert sorted(found.beside) == [
            "adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors", "model-q4.gguf",
            "optimizer.safetensors", "params.json", "pytorch_model.bin",
        ]  # fmt: skip
        with pytest.raises(CheckpointError, match="put on top of the model"):
            checkpoints.unmixed(folder)
        clean = folder.with_name(f"{folder.name}-clean")
        checkpoints.linked(found, clean)
        again = checkpoints.read(clean)
        assert (again.weights, again.tensors, dict(again.beside)) == (weights, found.tensors, {})
        assert checkpoints.hashed(clean) == checkpoints.hashed(folder)
        with monkeypatch.context() as patch:  # a file system without links
            patch.setattr(os, "symlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
            checkpoints.linked(found, folder.with_name(f"{folder.name}-copied"))
        copied = folder.with_name(f"{folder.name}-copied")
        assert checkpoints.hashed(copied) == checkpoints.hashed(folder)
        assert not any(path.is_symlink() for path in copied.iterdir())
        assert sorted(checkpoints.hashed(folder)) == sorted(found.files()), "what lies beside is no part of a manifest"


def test_two_saves_in_one_folder(tmp_path):
    """A newer save beside an older one: what one of them alone can be is read, and else a person has to say."""
    left = base(tmp_path / "left")
    shard(left, tuple(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), scale=0.9)
    found = checkpoints.read(shard(left))
    assert found.weights == NAMES and len(found.beside) == 3, "shards of an older save, which no index names any more"
    both = shard(single(tmp_path / "both"))
    refused(both, "two saves", "model.safetensors", NAMES[0])
    (both / NAMES[1]).unlink()
    found = checkpoints.read(both)
    assert found.weights == ("model.safetensors",), "the index of a save that is no longer whole"
    assert sorted(found.beside) == [NAMES[0], "model.safetensors.index.json"]
    (both / "model.safetensors.index.json").write_text("{oops")
    assert checkpoints.read(both).weights == ("model.safetensors",)
    own = single(tmp_path / "own")
    at = dict.fromkeys(TENSORS, "model.safetensors")
    (own / "model.safetensors.index.json").write_text(json.dumps({"weight_map": at}))
    assert checkpoints.read(own).weights == ("model.safetensors",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "pickled weights are never loaded"),
        ("model.pth", "pickled"),
        ("model-Q4_K_M.gguf", "GGUF alone (model-Q4_K_M.gguf)"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
    ],
)
def test_weights_that_are_no_safetensors(tmp_path, name, words):
    folder = base(tmp_path / "model")
    (folder / name).write_bytes(b"weights")
    refused(folder, "no safetensors file", name, words)


def test_safetensors_that_are_no_model(tmp_path):
    refused(base(tmp_path / "none"), "no safetensors file")
    other(base(tmp_path / "meta"), "consolidated.00.safetensors")
    refused(tmp_path / "meta", "names of Mistral or Meta alone (consolidated.00.safetensors)")
    folder = sharded(tmp_path / "shards")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "shards without their index", NAMES[0])
    (single(tmp_path / "named") / "model.safetensors").rename(tmp_path / "named" / "model.fp16.safetensors")
    refused(tmp_path / "named", "model.fp16.safetensors")
    (single(tmp_path / "bare") / "config.json").unlink()
    refused(tmp_path / "bare", "no config.json")
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "is a file", "GGUF")
    single(tmp_path / "trainer" / "checkpoint-500")
    with pytest.raises(CheckpointError) as error:
        checkpoints.look(tmp_path / "trainer")
    assert "checkpoint-500 in it looks like one" in error.value.hint


def test_an_index_that_cannot_be_used(tmp_path):
    folder = sharded(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for text, words in (
        ("", "is empty (0 bytes)"),
        ("{oops", "it is no JSON"),
        ("[1]", "no JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "no file beside it"),
        ('{"weight_map": {"a": 1}}', "no file beside it"),
        ('{"weight_map": {"a": "model-00009-of-00009.safetensors"}}', "names 1 of 1 files that are not there"),
        (POINTER, "Git LFS pointer"),
    ):
        index.write_text(text)
        refused(folder, words, "model.safetensors.index.json")
    index.write_text(whole.replace('"d"', '"e"'))
    refused(folder, "1 tensors in files that lack them: e")
    index.write_text(whole)
    shutil.copy(folder / NAMES[0], folder / NAMES[1])
    refused(folder, "is in two files")
    (folder / NAMES[1]).unlink()
    refused(folder, f"names 1 of 2 files that are not there: {NAMES[1]}")


def test_files_that_are_not_whole(tmp_path):
    folder = single(tmp_path / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content, words in (
        (b"", "is empty (0 bytes)"),
        (whole[:-4], "bytes, its header says"),
        (whole + b"\0", "bytes, its header says"),
        (whole[:50], "its header is longer than the file"),
        (whole[:5], "its header is longer than the file"),
        (b"<!DOCTYPE html><html>access to this model is gated</html>", "is damaged"),
        (whole.replace(b"F32", b"F99"), "is damaged"),
        (POINTER.encode(), "Git LFS pointer"),
    ):
        weights.write_bytes(content)
        refused(folder, words, "model.safetensors")
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "config.json"):
        kept = (folder / name).read_text()
        for content, words in (
            ("", "is empty"),
            (POINTER, "Git LFS pointer"),
            ("[]", "no JSON object"),
            ("{", "no JSON"),
        ):
            (folder / name).write_text(content)
            refused(folder, words, name)
        (folder / name).write_text(kept)
    (folder / "chat_template.jinja").write_text("")
    refused(folder, "chat_template.jinja is empty")


def test_links_as_the_cache_of_the_hub_has_them(tmp_path):
    cache = tmp_path / "models--acme--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("a" * 40)
    for i, path in enumerate(sorted(sharded(tmp_path / "model").iterdir())):
        shutil.copy(path, cache / "blobs" / f"{i:040x}")
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    assert checkpoints.read(snapshot).weights == NAMES
    assert checkpoints.hashed(snapshot) == checkpoints.hashed(tmp_path / "model")
    with pytest.raises(CheckpointError) as error:
        checkpoints.look(cache)
    assert f"snapshots/{'a' * 40}" in error.value.hint
    for name in (NAMES[0], "tokenizer.json"):
        blob = (snapshot / name).resolve()
        blob.rename(tmp_path / "away")
        refused(snapshot, name, "is a link to ../../blobs/", "which is not there")
        (tmp_path / "away").rename(blob)
    (snapshot / "README.md").symlink_to("nowhere")
    assert checkpoints.read(snapshot).weights == NAMES, "a link that nobody follows"


def test_an_adapter_alone(tmp_path):
    model = single(tmp_path / "model")
    for named in (str(model), "../model"):
        found = checkpoints.look(adapter(tmp_path / "adapter", named))
        assert isinstance(found, Adapter) and found.base_folder() == model
    with pytest.raises(CheckpointError, match="an adapter alone"):
        checkpoints.read(tmp_path / "adapter")
    found = checkpoints.look(adapter(tmp_path / "adapter", "acme/base-7b", revision="main"))
    assert isinstance(found, Adapter) and found.base_folder() is None and found.revision == "main"
    gone = checkpoints.look(adapter(tmp_path / "adapter", str(tmp_path / "gone")))
    assert isinstance(gone, Adapter)
    with pytest.raises(CheckpointError, match=r"its base is missing: there is no folder .*gone"):
        gone.base_folder()
    adapter(tmp_path / "adapter", str(model), peft_type="PREFIX_TUNING")
    refused(tmp_path / "adapter", "PREFIX_TUNING, which cannot be merged")
    adapter(tmp_path / "adapter", str(model), base_model_name_or_path=None)
    refused(tmp_path / "adapter", "does not name its base")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    refused(tmp_path / "adapter", "pickled")


PARTS = (
    "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "model.safetensors.index.json", *NAMES,
    "consolidated.safetensors", "params.json", "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin",
)  # fmt: skip
CHANGES = (
    "delete",
    "empty",
    "cut",
    "pointer",
    "flip",
    "dangle",
    "loop",
    "folder",
    "link",
    "json",
    "text",
    "copy",
    "fifo",
    "rename",
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@pytest.mark.slow
@given(
    start=st.sampled_from(("single", "sharded", "both", "adapter")),
    changes=st.lists(st.tuples(st.sampled_from(CHANGES), st.sampled_from(PARTS), st.integers(0, 2**16)), min_size=1, max_size=4),
)  # fmt: skip
def test_any_change_of_a_folder_is_taken_or_refused_by_name(tmp_path, start, changes):
    """What is taken opens with safetensors and is the same behind links; what is refused says what, where and what to do."""
    folder = tmp_path / "model"
    shutil.rmtree(tmp_path, ignore_errors=True)
    if start == "adapter":
        adapter(folder, str(single(tmp_path / "base")))
    else:
        {"single": single, "sharded": sharded, "both": lambda f: shard(single(f))}[start](folder)
    for change, name, number in changes:
        mutate(folder / name, change, number)
    try:
        found = checkpoints.look(folder)
    except CheckpointError as error:
        if str(folder) not in str(error) or not error.hint:
            raise
        return
    if isinstance(found, Adapter):
        assert found.tensors and found.base
        return
    held = {}
    for name in found.weights:
        with safe_open(folder / name, framework="numpy") as file:
            held |= {
                key: (file.get_slice(key).get_dtype(), tuple(file.get_slice(key).get_shape())) for key in file.keys()
            }
    assert held == found.tensors and isinstance(json.loads((folder / "config.json").read_text()), dict)
    checkpoints.linked(found, tmp_path / "clean")
    again = checkpoints.read(tmp_path / "clean")
    assert (again.weights, again.tensors, again.beside) == (found.weights, found.tensors, {})
    assert isinstance(found, Checkpoint) and set(os.listdir(folder)) >= {*found.weights, *found.beside}


def mutate(path: Path, change: str, number: int) -> None:
    content = path.read_bytes() if path.is_file() else b'{"a": 1}'
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    beside = path.parent / PARTS[number % len(PARTS)]
    if change == "empty":
        path.write_bytes(b"")
    elif change == "cut":
        path.write_bytes(content[: number % (len(content) + 1)])
    elif change == "pointer":
        path.write_text(POINTER)
    elif change == "flip":
        at = number % (len(content) or 1)
        path.write_bytes(content[:at] + bytes([number % 256]) + content[at + 1 :])
    elif change == "dangle":
        path.symlink_to("../nowhere")
    elif change == "loop":
        path.symlink_to(path.name)
    elif change == "folder":
        path.mkdir()
    elif change == "link" and beside != path:
        path.symlink_to(beside.name)
    elif change == "json":
        path.write_text(('{"weight_map": {"a": ""}}', "null", "[[[", '{"weight_map": []}', "1e999", '"a"')[number % 6])
    elif change == "text":
        path.write_bytes((b"\xff\xfe", b"<html>", b"{}", b"\x08" + bytes(7) + b"{}      ", b"\x00" * 64)[number % 5])
    elif change == "copy" and beside.is_file():
        shutil.copyfile(beside, path)
    elif change == "fifo":
        os.mkfifo(path)
    elif change == "rename":
        path.with_name(f"{number}-\udcff.safetensors").write_bytes(content)
