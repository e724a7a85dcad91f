"""Models that a process keeps: never read again, never changed by whoever trains a copy, known by their files alone."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from selfplay.errors import TrainError
from selfplay.models import weights
from selfplay.models.kept import Kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, tie_word_embeddings=True, **sizes)).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were read, in order."""
    found: list[str] = []
    load = weights.load

    def counted(folder: Path, *rest: object, **options: object) -> object:
        found.append(folder.name)
        return load(folder, *rest, **options)

    monkeypatch.setattr(weights, "load", counted)
    return found


def test_a_kept_model_is_read_once_and_whoever_changes_it_changes_a_copy(folder: Path, reads: list[str]) -> None:
    kept = Kept()
    before = load_file(folder / "model.safetensors")
    first = kept.own(folder)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    first.config.use_cache = False
    second = kept.shared(folder)
    second.forward = None
    third = kept.own(folder)
    assert reads == ["one"]
    assert all(torch.equal(third.state_dict()[name], tensor) for name, tensor in before.items())
    assert third.config.use_cache and callable(third.forward)
    assert third.lm_head.weight is third.model.embed_tokens.weight, "tied as it was"
    assert second.lm_head.weight.data_ptr() == kept.shared(folder).lm_head.weight.data_ptr(), "no second copy of it"


def test_what_was_written_is_there_without_being_read_and_its_parent_stays(
    folder: Path, tmp_path: Path, reads: list[str]
) -> None:
    kept = Kept()
    trained = kept.own(folder)
    with torch.no_grad():
        trained.model.norm.weight.add_(1.0)
    following = kept.beside(folder, trained)
    trained.save_pretrained(tmp_path / "two")
    kept.put(tmp_path / "two", following)
    (tmp_path / "two").rename(tmp_path / "three")  # a policy gets its number after it was written
    kept.only([folder, tmp_path / "three", tmp_path / "nowhere"])
    found = kept.own(tmp_path / "three")
    assert torch.equal(found.model.norm.weight, trained.model.norm.weight)
    assert found.name_or_path == found.config.name_or_path == str(tmp_path / "three")
    assert not torch.equal(kept.own(folder).model.norm.weight, trained.model.norm.weight)
    assert reads == ["one"]
    kept.only([folder])
    kept.own(tmp_path / "three")
    assert reads == ["one", "three"]


def test_files_that_have_changed_are_read_again(folder: Path, reads: list[str]) -> None:
    kept = Kept()
    kept.own(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(1, 1))
    assert torch.equal(kept.own(folder).model.norm.weight, tensors["model.norm.weight"])
    (folder / "config.json").unlink()
    with pytest.raises(TrainError, match="holds no checkpoint"):
        kept.own(folder)
    shutil.rmtree(folder)
    with pytest.raises(TrainError, match="holds no checkpoint"):
        kept.shared(folder)


def test_nothing_is_kept_where_the_host_has_no_memory_for_it(
    folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(p.numel() * 4 for p in weights.load(folder).parameters())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size))
    reads.clear()
    for kept in (Kept(), Kept(keeps=False)):
        model = kept.own(folder)
        assert kept.beside(folder, model) is None
        kept.shared(folder)
    assert reads == ["one"] * 4
