"""Looks at GPUs, on a machine whose nvidia-smi is a program of the test."""

import json
import os
from pathlib import Path

import pytest
from check_world import model, said, settings
from mini import ROOT

from selfplay.checks import hub, sizes
from selfplay.checks.check import check
from selfplay.checks.gpus import gpus, visible
from selfplay.checks.plan import plan
from selfplay.checks.timeline import timeline
from selfplay.config import load
from selfplay.planning import shapes

OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
FOUR = f"train.accelerate={ROOT / 'configs' / 'accelerate' / 'fsdp2-4.yaml'}"
LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts a program in the place of nvidia-smi, which knows so many GPUs of 80 GiB or says what it is told."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")

    def put(count=0, script=""):
        lines = [f"echo '{i}, GPU-{i:04x}-{i}, NVIDIA H100 80GB HBM3, 81920, 81920'" for i in range(count)]
        (programs / "nvidia-smi").write_text("\n".join(["#!/bin/sh", *lines, script]))
        (programs / "nvidia-smi").chmod(0o755)

    return put


def large(folder: Path, parameters: int, **config) -> Path:
    """A checkpoint whose header names so many parameters: a sparse file of zeros."""
    model(folder, **config)
    header = json.dumps({"a": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, 2 * parameters]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * parameters)
    return folder


def texts(config, about):
    return [(finding.level, finding.text) for finding in gpus(config, None) if finding.about == about]


def test_gpus_that_placement_names(tmp_path, smi):
    smi(script="echo '0, GPU-a, NVIDIA H100, 81559, 81000'; echo '1, GPU-b, NVIDIA H100, 81559, 2048'")
    policy = model(tmp_path / "policy")
    config = settings(tmp_path, policy, "placement={generator: [0], trainer: [1, 2]}")
    assert texts(config, "gpu") == [
        ("error", "placement.trainer names GPU 2; there are [0, 1]"),
        ("ok", "GPU 0 NVIDIA H100: 79.1 of 79.6 GiB free"),
        ("warning", "GPU 1 NVIDIA H100: 2.0 of 79.6 GiB free"),
    ]
    apart = "placement={generator: [0], trainer: [1]}"
    assert texts(settings(tmp_path, policy, apart), "gpu memory") == []
    smi(script="echo 'driver mismatch'; exit 9")
    assert said(config, tmp_path, "gpu") == ("error", "nvidia-smi failed: driver mismatch")


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        ("6,7", ["6", "7"]),
        ("GPU-0003,GPU-0001-1", ["3", "1"]),
        ("MIG-4f,2", ["MIG-4f", "2"]),
        ("5,99,4", ["5"]),  # CUDA takes no notice of what follows a GPU that is not there
        ("", []),
    ],
)
def test_numbers_count_the_gpus_that_are_visible_here(tmp_path, smi, monkeypatch, names, seen):
    smi(8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert [gpu.smi for gpu in visible()] == seen
    config = settings(tmp_path, model(tmp_path / "policy"), f"placement={{generator: [{len(seen)}]}}")
    level, text = texts(config, "gpu")[0]
    assert level == "error" and "placement" in text
    if seen:
        config = settings(tmp_path, tmp_path / "policy", f"placement={{generator: [{len(seen) - 1}], trainer: [0]}}")
        assert {level for level, _ in texts(config, "gpu")} <= {"ok", "warning"}


@pytest.mark.parametrize(
    ("setting", "about", "text"),
    [
        (["placement={generator: [0]}", "generate.engine.tensor_parallel=2"], "generate.engine.tensor_parallel",
         "2 GPUs are needed, the generator has 1 ([0])"),
        (["generate.engines=5"], "generate.engines", "5 engines of 1 GPUs each need 5 GPUs, the generator has 4"),
        (["generate.engines=[[0], [4]]"], "generate.engines", "generate.engines names GPU 4; there are 4"),
        (["generate.engines=[[0], [3]]", "placement={generator: [0, 1]}"], "generate.engines",
         "generate.engines names GPU 3, which is not among those of placement.generator, [0, 1]"),
        ([FOUR, "placement={trainer: [2, 3]}"], "train.accelerate", "4 GPUs are needed, the trainer has 2 ([2, 3])"),
    ],
)  # fmt: skip
def test_what_can_never_be_met_is_named(tmp_path, smi, setting, about, text):
    smi(4)
    config = settings(tmp_path, model(tmp_path / "policy"), "train.micro_batch_pairs=2", *setting)
    assert [level for level, said in texts(config, about) if said.startswith(text)] == ["error"]


def test_gpus_of_the_trainer_without_a_process_are_told(tmp_path, smi):
    smi(4)
    config = settings(tmp_path, model(tmp_path / "policy"), "placement={trainer: [2, 3]}")
    ((level, text),) = texts(config, "train.accelerate")
    assert level == "warning" and "its 1 processes use the first ones" in text and "set num_processes to 2" in text


def test_engines_on_a_cpu_need_cores(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    config = settings(tmp_path, model(tmp_path / "policy"), "generate.engines=3")
    ((level, text),) = texts(config, "generate.engines")
    assert level == "error" and text.startswith("3 engines of 1 threads each need 3 cores, this process may use 2")
    assert texts(settings(tmp_path, tmp_path / "policy", "generate.engines=2"), "generate.engines") == []


def test_models_against_the_memory_of_the_gpus(tmp_path, smi):
    """80 GiB each, 8e9 parameters. Full training takes 20 bytes each, 149.0 GiB, and a quarter of that on each of four, where
    2.8 GiB are gathered; beside them .5 of activations of 1,152 tokens, and .5 or 1.5 of CUDA. A reward in fp32 takes 29.8 GiB,
    5.5 for 16,384 tokens, and .5."""
    smi(4)
    policy = large(tmp_path / "policy", 8 * 10**9, **LLAMA_8B)
    base = [
        "policy.dtype=bfloat16",
        "train.bf16=true",
        "train.gradient_checkpointing=true",
        "train.micro_batch_pairs=4",
    ]

    def memory(*more):
        return [text for _, text in texts(settings(tmp_path, policy, *base, *more), "gpu memory")]

    (full,) = memory("placement={generator: [0], trainer: [1]}")
    assert full.startswith("GPU 1 has 80.0 GiB, and has to hold at least trainer 150.0 GiB")
    use = "generate.engine.gpu_memory_utilization=0.9"
    assert memory(FOUR, "placement={colocated: true}", use) == memory(FOUR, "placement=shared", use) == []
    apart = memory(FOUR, use)
    assert len(apart) == 1 and apart[0].startswith(
        "GPU 0 has 80.0 GiB, and has to hold at least engine 72.0 + trainer 42.0 GiB"
    )
    lora = "train.lora={r: 8, alpha: 16}"
    together = ("placement={generator: [0], trainer: [0]}", "generate.engine.gpu_memory_utilization=0.6")
    assert memory(lora, *together) == []
    reward = ("reward.rules=[]", f"reward.model={policy}", "reward.dtype=float32", "placement={colocated: true}")
    (sampling,) = memory(lora, *reward, use)
    assert "reward 35.8 + engine 72.0" in sampling and sampling.endswith("GiB while the engine samples")
    small = settings(tmp_path, policy, *base, lora, "generate.engine.gpu_memory_utilization=0.1")
    ((level, text),) = texts(small, "generate.engine.gpu_memory_utilization")
    assert level == "error" and text == "the policy's weights take 14.9 GiB of each GPU, vLLM may use 8.0"


@pytest.fixture
def known_models(monkeypatch):
    """The Hub's answers about the models of the shipped configurations: their sizes and config.json."""
    three = LLAMA_8B | {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    }
    answers = {False: (8_030_261_248, LLAMA_8B), True: (3_212_749_824, three)}

    def ask(name, revision=None):
        parameters, config = answers["3.2" in name]
        return hub.Told(files=("model.safetensors",), parameters=parameters, config=config)

    monkeypatch.setattr(hub, "ask", ask)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "count", "minutes", "share"),
    [
        ("one-gpu", 1, (25, 38), (0.6, 0.85)),
        ("eight-gpu-split", 8, (28, 40), (0.25, 0.4)),
        ("eight-gpu", 8, (18, 27), (0.45, 0.7)),
    ],
)
def test_the_gpu_configurations_fit_and_are_planned(smi, known_models, name, count, minutes, share):
    """Between an estimate made by hand: 36 minutes and 70 % of the time busy on one GPU with 4 more of hashing, and 27 to 35 minutes
    where eight GPUs are split, with scores under samples."""
    smi(count)
    config = load(ROOT / "configs" / f"{name}.yaml")
    found = list(gpus(config, None))
    assert [finding for finding in found if finding.level != "ok"] == [] and len(found) == count
    planned = timeline(config, visible())
    assert minutes[0] < planned.now / 60 < minutes[1] and share[0] < planned.share < share[1]
    rows = plan(config)
    drawn = [(what, text) for what, text in rows if what.startswith("GPU ")]
    assert [what for what, _ in drawn] == [f"GPU {i}" for i in range(count)]
    for i, (_, text) in enumerate(drawn):
        line, _, said_share = text.partition(" ")
        assert len(line) == 48 and said_share == f"{planned.busy(i):.0%}"
    lines = [text.partition(" ")[0] for _, text in drawn]
    if count == 8:
        assert all(f" {text}\n" in OPERATIONS for _, text in drawn), "docs/operations.md shows other lines"
    if name == "eight-gpu":
        assert len(set(lines)) == 1 and [c for i, c in enumerate(lines[0]) if c not in "·" + lines[0][:i]] == list(
            "gsdte"
        )
    if name == "eight-gpu-split":
        assert "g" in lines[0] and "t" not in lines[0] and set(lines[2]) <= set("se·") and set(lines[4]) <= set("dt·")
        assert lines[0][:10] == "g" * 10 and lines[2][:10] == "s" * 10, "they overlap"
    counted = dict(rows)["counted with"]
    assert "prompts of 205 and answers of 451 tokens; H100: 989 TFLOP/s, 3.35 TB/s" in counted


def test_stages_take_the_seconds_that_an_estimate_by_hand_says(smi, known_models):
    """The same round with one engine over two GPUs: 880, 540, 180 and 610 s; here without waiting for the slowest of each shard."""
    smi(8)
    split = ROOT / "configs" / "eight-gpu-split.yaml"
    planned = timeline(load(split, ["generate.engines=1", "generate.engine.tensor_parallel=2"]), visible())

    def took(what, gpu):
        return sum(s.seconds * s.busy for s in planned.spans if s.what == what and s.lane == f"GPU {gpu}")

    assert took("generate", 0) == pytest.approx(880, rel=0.2)
    assert took("score", 2) == pytest.approx(540, rel=0.15)
    assert took("depth", 4) == pytest.approx(180, rel=0.1)
    assert took("train", 4) == pytest.approx(610, rel=0.1)


def test_models_of_an_ensemble_on_the_same_gpus_score_one_after_the_other(smi, known_models):
    smi(8)
    two = "reward={dtype: bfloat16, ensemble: {members: [{model: a/one}, {model: b/two}]}}"
    for name in ("eight-gpu", "eight-gpu-split"):
        path = ROOT / "configs" / f"{name}.yaml"
        scores = [
            [s for s in timeline(load(path, more), visible()).spans if s.what == "score" and s.lane == "GPU 2"]
            for more in ([], [two])
        ]
        (alone,), (first, second) = scores
        worked = alone.seconds * alone.busy
        assert first.seconds * first.busy == pytest.approx(worked) == pytest.approx(second.seconds * second.busy)
        assert second.start >= first.end


@pytest.mark.slow
def test_gpus_that_stay_idle_are_a_warning(tmp_path, smi, known_models):
    smi(8)
    about = ("utilisation",)
    split = load(ROOT / "configs" / "eight-gpu-split.yaml")
    (found,) = [f for f in check(split, tmp_path / "run") if f.about in about]
    assert found.level == "warning" and "`placement: shared` lets every role use every GPU" in found.text
    shared = load(ROOT / "configs" / "eight-gpu.yaml")
    assert [f.level for f in check(shared, tmp_path / "run") if f.about in about] == ["ok"]
    one = load(ROOT / "configs" / "one-gpu.yaml")
    found = [f.text for f in check(one, tmp_path / "run") if f.about in about]
    assert "no role uses GPUs 1, 2, 3, 4, 5, 6, 7" in found


def test_without_a_gpu_or_a_size_there_is_no_timeline(tmp_path, smi, monkeypatch):
    policy = model(tmp_path / "policy")
    assert "time" not in dict(plan(settings(tmp_path, policy)))
    smi(1)
    assert "time" in dict(plan(settings(tmp_path, policy)))
    assert "time" not in dict(plan(settings(tmp_path, policy, "placement={trainer: [1]}")))
    monkeypatch.setattr(hub, "ask", lambda name, revision=None: hub.Told(away="ConnectError"))
    assert "time" not in dict(plan(settings(tmp_path, "org/away")))
    assert sizes.shape("org/away") is None
    monkeypatch.setattr(hub, "ask", lambda name, revision=None: hub.Told(parameters=8 * 10**9))
    assert sizes.shape("org/unknown") == shapes.usual(8 * 10**9)
