"""Nothing that comes with weights runs: neither Python files beside them nor pickles, unless the configuration asks for it."""

import ast
import json
import pickle
import re

import numpy as np
import pytest
from mini import ROOT
from safetensors.numpy import save_file

from selfplay.errors import InputError, TrainError
from selfplay.processes.children import inherited_environment

ODD = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
Path({ran!r}).touch()
"""


@pytest.fixture
def odd(tmp_path):
    """A checkpoint whose model, tokenizer and configuration are of a kind that only its own code knows."""
    folder = tmp_path / "odd"
    folder.mkdir()
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    auto_map = dict.fromkeys(names, "odd.Odd") | {"AutoTokenizer": ["odd.Odd", None]}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "odd", "architectures": ["Odd"], "auto_map": auto_map})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Odd", "auto_map": auto_map}))
    (folder / "odd.py").write_text(ODD.format(ran=str(tmp_path / "ran")))
    save_file({"weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_code_of_a_model_does_not_run_unless_it_is_trusted(odd, tmp_path):
    from reward.models import load
    from reward.scorer import ModelRefused
    from selfplay.models import weights
    from selfplay.models.rendering import load_tokenizer

    with pytest.raises(TrainError, match="cannot be loaded"):
        weights.load(odd)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(odd, False)
    with pytest.raises(ModelRefused):
        load(str(odd))
    assert not (tmp_path / "ran").exists() and not list(odd.glob("ran"))


class Bomb:
    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self):
        return open, (self._path, "w")


@pytest.mark.slow
def test_in_a_child_a_pickle_runs_nothing_whoever_loads_it_and_however(tmp_path, monkeypatch):
    import torch

    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran")), protocol=2))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    given = inherited_environment()
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):  # torch reads them at each call
        if name in given:
            monkeypatch.setenv(name, given[name])
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    torch.save({"step": 3, "weights": torch.zeros(2)}, tmp_path / "fine.pt")
    assert torch.load(tmp_path / "fine.pt", weights_only=False)["step"] == 3


@pytest.mark.slow
def test_no_module_reads_pickles():
    for path in [
        *(ROOT / "selfplay").rglob("*.py"),
        *(ROOT / "reward").rglob("*.py"),
        *(ROOT / "scripts").rglob("*.py"),
    ]:
        if not re.search(
            r"pickle|dill|joblib|marshal|shelve|weights_only|torch\.load|yaml", text := path.read_text(encoding="utf-8")
        ):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("allow_pickle", "False") == "False" and given.get("weights_only", "True") == "True", (
                    path
                )
                if ast.unparse(node.func) == "torch.load":
                    assert "weights_only" in given, path
                assert ast.unparse(node.func) not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), path
