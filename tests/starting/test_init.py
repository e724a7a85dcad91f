"""`selfplay init`, on machines whose nvidia-smi is a program of the test, and with answers of a Hub that cannot be reached."""

import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from mini import ROOT
from typer.testing import CliRunner

from selfplay import cli
from selfplay.checks import gpus, hub, hub_rows
from selfplay.checks.check import check
from selfplay.config import load
from selfplay.errors import InputError
from selfplay.starting import command
from selfplay.starting.presets import FSDP2, PRESETS

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES = {  # parameters and config.json, by a part of the name
    "0.5B": (494_032_768, {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}),
    "0.6B": (595_776_512, {"num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True}),
    "8B": (8_030_261_248, LLAMA | {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}),
    "3B": (3_212_749_824, LLAMA | {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192}),
    "70B": (70_553_706_496, LLAMA | {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "intermediate_size": 28672}),
}  # fmt: skip
MACHINES = {"0.5b": (1, 24), "8b-lora": (1, 80), "8b-full": (8, 80), "70b-lora": (8, 80)}  # GPUs, GiB of each
FILES = {"0.5b": "half-billion", "8b-lora": "one-gpu", "8b-full": "eight-gpu", "70b-lora": "seventy-billion"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Puts a program in the place of nvidia-smi, which knows so many GPUs of so many GiB; and a machine of 1 TiB, and the Hub."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    programs, real = tmp_path / "bin", os.sysconf
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(os, "sysconf", lambda name: 2**28 if name == "SC_PHYS_PAGES" else real(name))

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=put.disk))

    def ask(name, revision=None):
        parameters, config = next(
            SHAPES[part] for part in sorted(SHAPES, reverse=True) if f"-{part}" in name.replace("3.2-", "-")
        )
        return hub.Told(files=("model.safetensors",), parameters=parameters, config=config)

    monkeypatch.setattr(hub, "ask", ask)
    monkeypatch.setattr(hub_rows, "first", lambda *_, **__: hub_rows.Rows(why="the Hub does not answer", late=True))

    def put(count, gib):
        lines = [f"echo '{i}, GPU-{i:04x}, NVIDIA H100, {gib * 1024}, {gib * 1024}'" for i in range(count)]
        (programs / "nvidia-smi").write_text("\n".join(["#!/bin/sh", *lines]))
        (programs / "nvidia-smi").chmod(0o755)

    put.disk = 8 << 40
    return put


def init(*words: object) -> str:
    done = CliRunner().invoke(cli.app, ["init", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def values(text: str) -> list[str]:
    """The lines of a configuration with a value, but those of names and sections."""
    return [line for line in text.splitlines() if re.match(r" *\w+: ", line)]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_plan_confirms_every_preset(preset, tmp_path, machine):
    machine(*MACHINES[preset])
    file = tmp_path / "made" / "mine.yaml"
    said = init(file, "--preset", preset, "--yes")
    assert f"numbers of the preset {preset}" in said and f"selfplay check -c {file}" in said
    config = load(file)
    found = list(gpus.gpus(config, None))
    assert [finding for finding in found if finding.level == "error"] == [] and "error " not in said
    held = gpus.held(config, gpus.visible())
    assert any("trainer" in parts for moments in held.values() for parts in moments.values())  # the plan knew the sizes
    assert config.policy.model == PRESETS[preset].model and config.prompts.columns.prompt == "prompt"
    assert (config.train.lora is None) == (preset in ("0.5b", "8b-full"))
    assert config.generate.engine_count * config.generate.engine.tensor_parallel == MACHINES[preset][0]
    assert all("# " in line for line in values(file.read_text())), file.read_text()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_of_every_preset_fits_its_machine(preset, tmp_path, machine, monkeypatch):
    machine(*MACHINES[preset])
    monkeypatch.chdir(ROOT)
    config = load(ROOT / "configs" / f"{FILES[preset]}.yaml")
    assert config.policy.model == PRESETS[preset].model
    assert [finding.text for finding in gpus.gpus(config, None) if finding.level == "error"] == []
    if preset in ("0.5b", "70b-lora"):  # the others are older, and tuned by hand
        init(tmp_path / f"{config.run.name}.yaml", "--preset", preset, "--yes")
        made = load(tmp_path / f"{config.run.name}.yaml", [f"train.accelerate={config.train.accelerate or 'null'}"])
        assert made == config


def test_numbers_are_changed_until_they_fit(tmp_path, machine):
    """On one GPU of 48 GiB an adapter of 8B is trained, in 35 GiB, once its reward of 18 has left; not all weights, in 149."""
    machine(1, 48)
    machine.disk = 400 << 30  # nine policies of 8B with their masters take 404 GiB
    init(tmp_path / "a.yaml", "--preset", "8b-full", "--yes")
    made = load(tmp_path / "a.yaml")
    assert made.train.lora is not None and made.train.learning_rate == 5e-6 and made.placement.shared
    assert made.retention.last == 1
    with pytest.raises(InputError, match="70B-Instruct does not fit on 1 × NVIDIA H100, 48 GiB each") as error:
        init(tmp_path / "b.yaml", "--preset", "70b-lora", "--yes")
    assert "more GPUs" in error.value.hint and not (tmp_path / "b.yaml").exists()
    machine.disk = 8 << 40
    machine(6, 80)  # no file of accelerate is shipped for six
    init(tmp_path / "c.yaml", "--preset", "8b-full", "--yes")
    made = load(tmp_path / "c.yaml")
    assert made.train.accelerate == tmp_path / "c-accelerate.yaml" and made.train.batch_pairs % 6 == 0
    assert [f.text for f in check(made, tmp_path / "run") if f.level == "error"] == []
    shipped = (ROOT / "configs" / "accelerate" / "fsdp2-8.yaml").read_text().replace("# Eight", "# 8")
    assert FSDP2.format(processes=8) == shipped


def test_what_is_there_is_recognised_and_the_file_passes_check(mini_world, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    words = (
        "--model",
        mini_world / "policy",
        "--prompts",
        mini_world / "train.jsonl",
        "--reward",
        mini_world / "reward",
    )
    said = init(*words)
    assert "0.2 M parameters" in said and "it reads 512 tokens" in said and "messages, 874 prompts" in said
    assert "no GPU; " in said and "next: selfplay check -c selfplay.yaml" in said
    made = load("selfplay.yaml")
    assert [f.text for f in check(made, made.run_dir) if f.level == "error"] == []
    assert made.policy.dtype == "float32" and made.run.name == "selfplay" and made.train.max_length < 512
    assert made.evaluate.prompts == 24  # all that are held out of 874
    with pytest.raises(InputError, match=r"selfplay.yaml exists already") as error:
        init(*words)
    assert "--force" in error.value.hint
    before = Path("selfplay.yaml").read_text()
    with pytest.raises(InputError, match="needs instruction_id_list"):  # what these prompts have no answer for
        init(*words[:4], "--reward", "instructions", "--force")
    assert Path("selfplay.yaml").read_text() == before
    init(*words, "--force")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--model", "org/model"], "--prompts and --reward missing"),
        ([".", "--preset", "0.5b", "--force"], "is a folder"),
        (["--preset", "9b"], "there is no preset '9b'"),
        (["--preset", "0.5b", "--model", "nowhere"], "nowhere: no such folder"),
        (["--preset", "0.5b", "--model", "org/m", "--reward", "rules"], "the reward 'rules' needs settings"),
        (["--preset", "0.5b", "--model", "org/m", "--prompts", "none.jsonl"], "none.jsonl"),
        (["--preset", "0.5b", "--reward", "http://user:word@host"], "holds a user, a password.* api_key_env"),
    ],
)
def test_what_cannot_be_used_is_named_and_nothing_is_written(words, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=what) as error:  # InputError or ConfigError
        init(*words)
    assert error.value.exit_code == 2 and "word@" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reward_server_says_what_it_is(tmp_path, monkeypatch):
    from http_stand_in import answering

    monkeypatch.chdir(tmp_path)
    models = {"/v1/models": json.dumps({"data": [{"id": "rm", "root": "/models/rm"}]})}
    with answering(models) as url:
        said = init("--preset", "0.5b", "--reward", url, "--yes")
    made = load("selfplay.yaml").reward
    assert (made.dialect, made.served_model, made.tokenizer) == ("vllm-classify", "rm", "/models/rm")
    assert "a vLLM server of rm" in said and Path("selfplay.yaml").is_file()


def test_a_terminal_is_asked_for_what_is_missing(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("org/m\n\norg/r\n"))
    given = {"model": None, "prompts": None, "reward": None}
    found = command._answers(given, "0.5b", may_ask=True)
    assert found == {"model": "org/m", "prompts": PRESETS["0.5b"].prompts["source"], "reward": "org/r"}
