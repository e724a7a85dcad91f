"""Looks at models and settings that need no world: folders made by hand."""

import json
import socket
from types import SimpleNamespace

import pytest
from mini import ROOT, TINY

from selfplay.check import check
from selfplay.config import load


def model(folder, *, template=True, tokenizer=True, **settings):
    """A checkpoint of one small tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | settings))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def settings(tmp_path, policy, *more):
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "x"}\n')
    files = [f"prompts.source={tmp_path / 'train.jsonl'}", f"prompts.heldout={tmp_path / 'heldout.jsonl'}"]
    reward = ["reward.model=null", "reward.rules=[{rule: length, max: 9}]", "evaluate.judge=null"]
    return load(TINY, [f"policy.model={policy}", *files, *reward, *more])


def said(config, tmp_path, about):
    return next(((f.level, f.text) for f in check(config, tmp_path / "run") if f.about == about), None)


def test_a_model_needs_a_tokenizer_and_a_chat_template(tmp_path):
    whole = model(tmp_path / "whole", max_position_embeddings=512)
    assert said(settings(tmp_path, whole), tmp_path, "policy.model")[0] == "ok"
    mute = model(tmp_path / "mute", template=False)
    level, text = said(settings(tmp_path, mute), tmp_path, "policy.model")
    assert level == "error" and "no chat template" in text and "instruct model" in text
    (mute / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert said(settings(tmp_path, mute), tmp_path, "policy.model")[0] == "ok"
    bare = model(tmp_path / "bare", tokenizer=False)
    assert said(settings(tmp_path, bare), tmp_path, "policy.model") == ("error", f"{bare} has no tokenizer")
    reward = ("reward.rules=[]", f"reward.model={model(tmp_path / 'reward', template=False, id2label={'0': 'x'})}")
    assert said(settings(tmp_path, whole, *reward), tmp_path, "reward.model")[0] == "error"


@pytest.mark.parametrize("nested", [False, True])
def test_the_context_of_the_policy(tmp_path, nested):
    """configs/tiny.yaml: 96 + 48 + 1 tokens for the engine, 144 for the trainer."""
    limits = {"max_position_embeddings": 145}
    fits = model(tmp_path / "fits", **({"text_config": limits} if nested else limits))
    assert said(settings(tmp_path, fits), tmp_path, "context") == ("ok", "the policy reads up to 145 tokens")
    level, text = said(settings(tmp_path, fits, "train.max_length=200"), tmp_path, "context")
    assert level == "error" and text.endswith("but train.max_length is 200")
    short = model(tmp_path / "short", max_position_embeddings=144)
    level, text = said(settings(tmp_path, short), tmp_path, "context")
    assert level == "error" and "generate.max_tokens + 1 is 145" in text
    unknown = model(tmp_path / "unknown")
    assert said(settings(tmp_path, unknown), tmp_path, "context") is None


def test_batches_over_processes(tmp_path):
    policy = model(tmp_path / "policy")
    four = f"train.accelerate={ROOT / 'configs' / 'accelerate' / 'fsdp2-4.yaml'}"
    level, text = said(settings(tmp_path, policy, four), tmp_path, "train.batch_pairs")
    assert level == "error" and text.endswith("not a multiple of 64")
    right = settings(tmp_path, policy, four, "train.micro_batch_pairs=2")
    assert said(right, tmp_path, "training") == ("ok", "16 pairs a step on 4 processes, 2 at a time each")
    gone = settings(tmp_path, policy, f"train.accelerate={tmp_path / 'none.yaml'}")
    assert said(gone, tmp_path, "train.accelerate")[0] == "error"
    assert said(settings(tmp_path, policy), tmp_path, "training") is None


def test_gpus_that_placement_names(tmp_path, monkeypatch):
    """A program in the place of nvidia-smi: two GPUs, one of them in use."""
    programs = tmp_path / "bin"
    programs.mkdir()
    smi = programs / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, NVIDIA H100, 81559, 81000'\necho '1, NVIDIA H100, 81559, 2048'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    config = settings(tmp_path, model(tmp_path / "policy"), "placement={generator: [0], trainer: [1, 2]}")
    found = [(f.level, f.text) for f in check(config, tmp_path / "run") if f.about == "gpu"]
    assert found == [
        ("error", "placement.trainer names GPU 2; there are [0, 1]"),
        ("ok", "GPU 0 NVIDIA H100: 79.1 of 79.6 GiB free"),
        ("warning", "GPU 1 NVIDIA H100: 2.0 of 79.6 GiB free"),
    ]
    smi.write_text("#!/bin/sh\necho 'driver mismatch'; exit 9\n")
    assert said(config, tmp_path, "gpu") == ("error", "nvidia-smi failed: driver mismatch")


def test_models_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    class Hub:
        def model_info(self, name, timeout):
            if name == "org/away":
                raise OSError("no network")
            files = ["config.json", "model.safetensors" if name == "org/whole" else "pytorch_model.bin"]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    expected = {
        "org/whole": ("ok", "org/whole: on the Hub, with safetensors"),
        "org/pickled": ("error", "org/pickled has no safetensors on the Hub"),
        "org/away": ("warning", "org/away: the Hub could not be asked (OSError); a copy in the cache may do"),
        "./nowhere": ("error", "./nowhere: no such folder"),
    }
    for name, finding in expected.items():
        assert said(settings(tmp_path, name), tmp_path, "policy.model") == finding
    assert said(settings(tmp_path, "org/whole"), tmp_path, "disk")[0] == "warning"


def test_a_port_that_is_taken_is_a_warning(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = settings(tmp_path, model(tmp_path / "policy"), f"service.port={port}")
        level, text = said(config, tmp_path, "port")
    assert level == "warning" and f"127.0.0.1:{port} cannot be taken" in text


def test_a_policy_that_neither_disk_nor_memory_can_hold(tmp_path, monkeypatch):
    policy = model(tmp_path / "policy")
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**13], "data_offsets": [0, 0]}}).encode()
    (policy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    config = settings(tmp_path, policy)
    assert said(config, tmp_path, "disk")[0] == said(config, tmp_path, "memory")[0] == "error"
