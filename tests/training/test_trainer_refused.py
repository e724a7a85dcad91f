"""Policies, pairs and settings that a job of the trainer refuses, and the agreement check."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_world import fails, job_of, run, write_pairs
from transformers import AutoModelForCausalLM

from selfplay.errors import TrainError
from selfplay.models import weights
from selfplay.training.epsilon_dpo import EpsilonDPOTrainer
from selfplay.training.jobs import LoraJob
from selfplay.training.train_job import agreement, train

pytestmark = pytest.mark.service


def test_pairs_of_another_policy_do_not_pass_the_agreement_check(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, reference=world / "other"), "agreement", "bound on the mean is 0.0001")
    off = write_pairs(tmp_path / "off.parquet", world / "policy", off=0.01)
    fails(job_of(world, tmp_path, pairs=off), "agreement", "differ from the generator's by 0.01 nats")
    assert not list((tmp_path / "work").glob("checkpoint-*"))


def test_agreement_by_hand() -> None:
    """|Δ| a token: 0.5/1, 1/4, 0/2 → mean 0.25; the 99th percentile lies 98 % of the way from 0.25 to 0.5."""
    found = agreement(np.array([1.0, 2.0, 3.0]), np.array([1.5, 1.0, 3.0]), np.array([1, 4, 2]))
    assert found == {"mean": pytest.approx(0.25), "p99": pytest.approx(0.495), "tokens": 7}


def test_a_seeded_sample_of_the_pairs_is_compared_where_there_are_more(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of twelve pairs in batches of two. The job goes on where it was although another number is compared now."""
    everything = [row["prompt_ids"] for row in pq.read_table(world / "pairs.parquet").to_pylist()]
    compared: list[list[list[int]]] = []
    reference_logps = EpsilonDPOTrainer.reference_logps

    def record(self: EpsilonDPOTrainer, pairs: Any, *rest: Any) -> Any:
        compared.append(pairs["prompt_ids"][:])
        return reference_logps(self, pairs, *rest)

    monkeypatch.setattr(EpsilonDPOTrainer, "reference_logps", record)

    def sampled(name: str, **changes: Any) -> tuple[list[int], dict[str, Any], list[tuple[int, int]]]:
        result, seen = run(job_of(world, tmp_path / name, epochs=1, save_steps=1, **changes))
        return [everything.index(ids) for ids in compared.pop()], result, seen

    rows, result, seen = sampled("one", agreement_pairs=5)
    assert len(set(rows)) == 5 and rows == sorted(rows)
    assert [step for step, _ in seen] == [0] * 3 + [1, 2, 3]
    of_rows = pq.read_table(world / "pairs.parquet").take(rows).to_pylist()
    assert result["agreement"]["tokens"] == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in of_rows)
    assert result["agreement"]["mean"] < 1e-5
    assert sampled("again", agreement_pairs=5)[0] == rows
    assert sampled("other", agreement_pairs=5, seed=6)[0] != rows
    assert sampled("all", agreement_pairs=99)[0] == list(range(12))
    shutil.rmtree(tmp_path / "one" / "work" / "checkpoint-3")
    more = job_of(world, tmp_path / "one", epochs=1, save_steps=1, agreement_pairs=7)
    again, seen = run(more)
    assert ([step for step, _ in seen], compared, again["agreement"]) == ([3], [], result["agreement"])


def test_pairs_that_disagree_are_found_by_the_sample(world: Path, tmp_path: Path) -> None:
    off = write_pairs(tmp_path / "off.parquet", world / "policy", off=0.01)
    fails(
        job_of(world, tmp_path, pairs=off, agreement_pairs=1), "agreement", "differ from the generator's by 0.01 nats"
    )


def test_training_that_changes_nothing_is_an_error(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, learning_rate=1e-7, epochs=1, min_update=1e-3), "no_update", "moved the weights by")


def test_a_policy_with_a_nan_is_an_error(world: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world / "policy", tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    fails(job_of(world, tmp_path, policy=broken, agreement_mean=None, agreement_p99=None), "nonfinite", "loss is nan")
    fails(job_of(world, tmp_path, reference=broken), "agreement", "differ")


def test_checkpoints_that_are_not_whole(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, policy=tmp_path / "nowhere"), "input", "nowhere holds no checkpoint")

    def broken(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = Path(shutil.copytree(world / "policy", tmp_path / name))
        return folder, load_file(folder / "model.safetensors")

    truncated, _ = broken("truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    missing, tensors = broken("missing")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    shape, tensors = broken("shape")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 32)
    save_file(tensors, shape / "model.safetensors", metadata={"format": "pt"})
    for folder in (truncated, missing, shape):
        fails(job_of(world, tmp_path, policy=folder), "input", folder.name)
        fails(job_of(world, tmp_path, reference=folder), "input", folder.name)


def test_settings_and_pairs_that_cannot_be_trained_on(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, batch_pairs=5), "input", "not a multiple")
    fails(job_of(world, tmp_path, processes=2), "input", "asks for 2 processes, and the launcher started 1")
    fails(job_of(world, tmp_path, max_length=8), "input", "never truncates")
    fails(job_of(world, tmp_path, max_length=65), "input", "context of 64")
    fails(job_of(world, tmp_path, beta_min=0.2), "input", "beta_min")
    fails(job_of(world, tmp_path, lora=LoraJob(target_modules=["nothing"])), "input", "nothing")
    fails(job_of(world, tmp_path, lora=LoraJob(target_modules=["lm_head"])), "input", "lm_head")
    (tmp_path / "text.parquet").write_text("no parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "text.parquet"), "input", "no Parquet file")
    pq.write_table(pq.read_table(world / "pairs.parquet").drop_columns(["chosen_logp"]), tmp_path / "less.parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "less.parquet"), "input", "lacks chosen_logp")
    pq.write_table(pq.read_table(world / "pairs.parquet").slice(0, 0), tmp_path / "empty.parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "empty.parquet"), "input", "no pairs")


def test_a_gpu_that_others_fill_is_noticed_before_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy with gradient and two moments, and a reference of its own; with an adapter the policy is all."""
    elements = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "policy").parameters())
    monkeypatch.setattr(weights, "free_memory", lambda: elements * 4 * 5 - 1)
    with pytest.raises(TrainError, match="the GPU has .* GiB free") as error:
        train(job_of(world, tmp_path), lambda *_: None)
    assert error.value.kind == "oom" and "nvidia-smi" in error.value.hint
    monkeypatch.setattr(weights, "free_memory", lambda: elements * 4)
    run(job_of(world, tmp_path, lora=LoraJob(r=2), epochs=1))
