import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from outside import until
from safetensors.torch import load_file, save_file
from trainer_world import bytes_of, checkpoint, job_of, start
from trl.trainer.dpo_trainer import DataCollatorForPreference

from selfplay.errors import TrainError
from selfplay.methods.depth import closeness_to_others, cluster, rank_correlation, sizes
from selfplay.methods.features import linear_layers, pair_features
from selfplay.models import weights
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.reaping import descendants, marked
from selfplay.storage import tables
from selfplay.training.depth_job import batches, collate, features, load
from selfplay.training.jobs import FeaturesJob, LoraJob
from selfplay.training.train_job import train
from selfplay.types import PairGradient

pytestmark = pytest.mark.service

LOSS = {"beta": 0.1, "epsilon": 0.1}
UNCHECKED = {"agreement_mean": None, "agreement_p99": None}


def write_pairs(path: Path, n: int = 11, seed: int = 0) -> Path:
    """Random pairs, of which the third is not kept."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(3, 60, rng.integers(1, 12)).tolist()

    rows = [
        {"prompt_id": f"p{i}", "prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(), "chosen_logp": 0.0,
         "rejected_logp": 0.0, "kept_because": None if i == 2 else "base"} for i in range(n)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    checkpoint(root / "policy")
    checkpoint(root / "other", seed=5)
    write_pairs(root / "pairs.parquet")
    return root


def features_job(world: Path, out: Path, **changes: Any) -> FeaturesJob:
    settings: dict[str, Any] = {
        "pairs": world / "pairs.parquet", "policy": world / "policy", "reference": world / "policy", "out": out,
        "dim": 48, "clusters": 3, "seed": 2**63 + 5, "micro_batch_pairs": 4, **LOSS,
    }  # fmt: skip
    return FeaturesJob(**(settings | changes))


def run(job: FeaturesJob) -> dict[str, float | None]:
    done: list[int] = []
    result = features(job, done.append)
    assert result is not None and done == sorted(done)
    json.dumps(result, allow_nan=False)
    return result


def found_in(path: Path) -> tuple[list[PairGradient], np.ndarray]:
    column = pq.read_table(path)["feature"].combine_chunks()
    return tables.read_rows(path, PairGradient), column.flatten().to_numpy().reshape(len(column), -1)


def kept(world: Path) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(world / "pairs.parquet").to_pylist() if row["kept_because"]]


# --- a job ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["policy", "other"])
def test_features_clusters_and_closeness_in_the_order_of_the_pairs(world: Path, tmp_path: Path, reference: str) -> None:
    job = features_job(world, tmp_path / "g.parquet", reference=world / reference)
    metrics = run(job)
    rows, found = found_in(job.out)
    pairs = kept(world)
    assert [row.prompt_id for row in rows] == [pair["prompt_id"] for pair in pairs] and len(pairs) == 10
    policy = weights.load(world / "policy").eval()
    other = None if reference == "policy" else weights.load(world / "other").eval()
    alone = [pair_features(policy, collate([pair]), 48, job.seed, reference=other, **LOSS)[0].numpy() for pair in pairs]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5 * np.linalg.norm(alone, axis=1).max())
    labels, closeness = cluster(found, 3, job.seed)
    assert [row.cluster for row in rows] == labels.tolist()
    assert [row.closeness for row in rows] == closeness.tolist()
    assert [row.norm for row in rows] == pytest.approx(np.linalg.norm(found, axis=1))
    tokens = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
    assert metrics["clusters"] == 3
    assert metrics["closeness_mean"] == pytest.approx(closeness.mean())
    assert metrics["closeness_std"] == pytest.approx(closeness.std())
    assert metrics["closeness_length_correlation"] == pytest.approx(rank_correlation(closeness, tokens))
    assert metrics["closeness_size_correlation"] == pytest.approx(rank_correlation(closeness, sizes(labels)))
    assert -1 <= metrics["closeness_to_others"] < metrics["closeness_mean"]
    assert metrics["zero_gradients"] == metrics["nonfinite_gradients"] == 0
    assert {"seconds_load", "seconds_features", "seconds_cluster"} <= metrics.keys()


def test_the_same_job_writes_the_same_bytes_and_batches_do_not_show(world: Path, tmp_path: Path) -> None:
    one, again, single = (
        features_job(world, tmp_path / name, micro_batch_pairs=n) for name, n in (("1", 4), ("2", 4), ("3", 1))
    )
    for job in (one, again, single):
        run(job)
    assert one.out.read_bytes() == again.out.read_bytes()
    np.testing.assert_allclose(found_in(single.out)[1], found_in(one.out)[1], rtol=1e-3, atol=1e-6)


def test_other_settings_and_what_they_change(world: Path, tmp_path: Path) -> None:
    def directions(name: str, **changes: Any) -> np.ndarray:
        job = features_job(world, tmp_path / name, **changes)
        run(job)
        found = found_in(job.out)[1]
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def agreement(a: np.ndarray, b: np.ndarray) -> float:
        """The least cosine of two features of a pair."""
        return float((a * b).sum(axis=1).min())

    plain = directions("plain")
    assert agreement(plain, directions("recomputed", gradient_checkpointing=True)) > 1 - 1e-6
    assert agreement(plain, directions("low", dtype="bfloat16")) > 0.99
    assert np.abs(plain - directions("seed", seed=7)).max() > 0.1
    assert directions("last", layers=1, dim=20).shape == (10, 20)
    lora = directions("lora", lora=LoraJob(r=4, alpha=8))
    assert np.isfinite(lora).all() and (lora == directions("lora again", lora=LoraJob(r=4, alpha=8))).all()
    assert agreement(lora, directions("lora low", lora=LoraJob(r=4, alpha=8), dtype="bfloat16")) > 0.99


def test_closeness_to_the_others_of_a_cluster(world: Path, tmp_path: Path) -> None:
    job = features_job(world, tmp_path / "g.parquet", closeness="others", clusters=6)
    metrics = run(job)
    rows, found = found_in(job.out)
    labels, _ = cluster(found, 6, job.seed)
    alone = np.bincount(labels)[labels] == 1
    assert alone.any() and not alone.all()
    assert [row.cluster for row in rows] == labels.tolist()
    assert [row.closeness is None for row in rows] == alone.tolist()
    others = closeness_to_others(found, labels)
    assert [row.closeness for row in rows if row.closeness is not None] == others[~alone].tolist()
    assert metrics["closeness_mean"] == pytest.approx(metrics["closeness_to_others"])
    assert metrics["closeness_to_others"] == pytest.approx(others[~alone].mean())


def test_pairs_without_a_gradient_have_no_cluster(world: Path, tmp_path: Path) -> None:
    """Equal responses have none, and the word 4 has a NaN embedding."""
    rows = kept(world)
    rows[1]["rejected_ids"] = rows[1]["chosen_ids"] = [5, 6, 7]
    for row in rows:
        row |= {name: [i if i != 4 else 5 for i in row[name]] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    rows[4]["prompt_ids"] = [4]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    broken = Path(shutil.copytree(world / "policy", tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][4] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    # Tied, the head would make every log-probability NaN.
    config = json.loads((broken / "config.json").read_text()) | {"tie_word_embeddings": False}
    (broken / "config.json").write_text(json.dumps(config))
    tensors["lm_head.weight"] = torch.randn(60, 32)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = features_job(
        world, tmp_path / "g.parquet", pairs=tmp_path / "pairs.parquet", policy=broken, reference=broken,
        micro_batch_pairs=1,
    )  # fmt: skip
    metrics = run(job)
    found = found_in(job.out)[0]
    assert [i for i, row in enumerate(found) if row.cluster is None] == [1, 4]
    assert found[1].closeness is None and found[1].norm == 0 and not np.isfinite(found[4].norm)
    assert metrics["zero_gradients"] == metrics["nonfinite_gradients"] == 1
    assert metrics["closeness_mean"] > 0


def test_batches_are_of_like_length_and_as_the_trainers_collator_makes_them(world: Path) -> None:
    assert batches([3, 9, 4, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    pairs = kept(world)
    ours, theirs = collate(pairs), DataCollatorForPreference(pad_token_id=0)(pairs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_adapter_has_gradients_of_its_own_matrices(world: Path) -> None:
    policy, reference = load(features_job(world, world / "x", lora=LoraJob(r=4, target_modules=["q_proj"])))
    assert reference is None
    assert sorted(linear_layers(policy)) == ["0.self_attn.q_proj.lora_B", "1.self_attn.q_proj.lora_B"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_jobs_that_cannot_be_done(world: Path, tmp_path: Path) -> None:
    def fails(words: str, **changes: Any) -> None:
        job = features_job(world, tmp_path / "g.parquet", **changes)
        with pytest.raises(TrainError, match=words) as error:
            run(job)
        assert error.value.kind == "input" and error.value.hint
        assert not job.out.exists()

    fails("nowhere holds no checkpoint", policy=tmp_path / "nowhere")
    fails(r"layers must lie in \[1, 2\]", layers=3)
    fails("nothing", lora=LoraJob(target_modules=["nothing"]))
    (tmp_path / "text.parquet").write_text("no parquet")
    fails("no Parquet file", pairs=tmp_path / "text.parquet")
    table = pq.read_table(world / "pairs.parquet")
    pq.write_table(table.drop_columns(["chosen_ids"]), tmp_path / "less.parquet")
    fails("no Parquet file", pairs=tmp_path / "less.parquet")
    pq.write_table(table.slice(2, 1), tmp_path / "none.parquet")
    fails("no pair that was kept", pairs=tmp_path / "none.parquet")
    empty = table.slice(0, 1).to_pylist()
    pq.write_table(pa.Table.from_pylist([empty[0] | {"rejected_ids": []}]), tmp_path / "empty.parquet")
    fails("prompt p0 lacks", pairs=tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="clusters"):
        features_job(world, tmp_path / "x", clusters=0)


# --- the process ------------------------------------------------------------------------------------------------------


def test_a_gpu_that_others_fill_is_noticed_before_a_model_goes_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = sum(p.numel() * 4 for p in load(features_job(world, tmp_path))[0].parameters())
    monkeypatch.setattr(weights, "free_memory", lambda: 2 * held - 1)
    assert run(features_job(world, tmp_path / "one.parquet"))
    with pytest.raises(TrainError, match="the GPU has .* GiB free, and weights alone take") as error:
        run(features_job(world, tmp_path / "two.parquet", reference=world / "other"))
    assert error.value.kind == "oom"


def test_each_process_asks_its_own_gpu_for_memory(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two processes, where CUDA is told to be there: its GPU is chosen before anything is asked of one."""
    chosen = [torch.device("cuda", 0)]
    asked: list[torch.device] = []

    def told() -> tuple[int, int]:
        asked.append(chosen[-1])
        return 0, 0

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", told)
    with pytest.raises(TrainError, match="the GPU has 0.0 GiB free"):
        run(features_job(world, tmp_path / "one.parquet"))
    assert asked == [torch.device("cuda", 1)]


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """One behind accelerate's launcher, which imports while the tests without a child run."""
    config = Path(__file__).parents[2] / "configs" / "accelerate" / "single.yaml"
    launcher = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    argv = (sys.executable, *launcher, "-m", "selfplay.training.trainer", "--clusters")
    found = start(tmp_path_factory.mktemp("child"), *argv)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def child(started: Child) -> Child:
    started.wait_for("ready")
    return started


@pytest.mark.slow
def test_the_trainer_takes_features_and_then_trains(world: Path, tmp_path: Path, child: Child) -> None:
    with pytest.raises(ChildError, match="layers must lie in") as error:
        child.order("features", job=features_job(world, tmp_path / "g", layers=9).model_dump(mode="json"))
    assert error.value.kind == "input" and "depth.layers" in error.value.hint
    with pytest.raises(ChildError, match=r"the job is not valid: dim"):
        child.order("features", job=features_job(world, tmp_path / "g").model_dump(mode="json") | {"dim": 0})
    events: list[dict[str, Any]] = []
    job = features_job(world, tmp_path / "g")
    metrics = child.order("features", job=job.model_dump(mode="json"), on_event=events.append)
    assert [event["done"] for event in events] == [4, 8, 10] and metrics["clusters"] == 3
    here = features_job(world, tmp_path / "here")
    run(here)
    assert job.out.read_bytes() == here.out.read_bytes()
    # Training after it ends with the bytes of training in this process.
    lora = LoraJob(r=4, alpha=8)
    after, apart = (job_of(world, tmp_path / name, epochs=1, lora=lora, **UNCHECKED) for name in ("after", "apart"))
    child.order("features", job=features_job(world, tmp_path / "lora", lora=lora).model_dump(mode="json"))
    child.order("train", job=after.model_dump(mode="json"))
    train(apart, lambda *_: None)
    ours, theirs = bytes_of(after.out), bytes_of(apart.out)
    # PEFT writes the set of target modules in the order of the process's hashes.
    assert {name for name in ours if ours[name] != theirs[name]} <= {"adapter/adapter_config.json"}


@pytest.mark.slow
def test_a_trainer_whose_launcher_is_killed_dies_with_it(world: Path, tmp_path: Path, child: Child) -> None:
    """The last test with the child."""
    launcher, _ = descendants(child.pid)
    os.kill(launcher, signal.SIGKILL)
    with pytest.raises(ChildDied):
        child.order("train", job=job_of(world, tmp_path, epochs=1).model_dump(mode="json"))
    until(lambda: not marked(child.log.parent), 20)
