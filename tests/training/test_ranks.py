"""Several processes train and take features as one does: DDP and FSDP2, all weights and an adapter, fp32 and bf16."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_depth_job import features_job
from test_depth_job import run as run_features
from test_depth_job import write_pairs as write_base_pairs
from trainer_world import bytes_of, checkpoint, job_of, run, start, write_pairs

from selfplay.processes.child import Child
from selfplay.training.jobs import LoraJob, TrainJob

pytestmark = [pytest.mark.service, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
TWO = {
    "ddp": [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "selfplay.training.trainer"],
    "fsdp": [*PYTHON, "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/fsdp2-4.yaml"),
             "--num_processes", "2", str(ROOT / "tests/fsdp_trainer.py")],
}  # fmt: skip

# 21 pairs, 2 at a time in each of two processes: of the last micro-batches of an epoch one process has one pair, and the
# other has none.
EXACT: dict[str, Any] = {"batch_pairs": 8, "micro_batch_pairs": 2, "epochs": 2, "learning_rate": 1e-3,
                         "schedule": "linear"}  # fmt: skip
# One micro-batch of each process a step: two numbers have the same sum in either order, and bf16 shows the last bits. It also
# shows the shape of a batch, so all of them are full: beside a repeated pair, a pair is rounded otherwise than alone.
BF16: dict[str, Any] = {
    "pairs": "full.parquet",
    "bf16": True,
    "batch_pairs": 4,
    "micro_batch_pairs": 2,
    "epochs": 1,
    "learning_rate": 1e-3,
}
UNCHECKED = {"agreement_mean": None, "agreement_p99": None}
LORA = {"lora": LoraJob(r=4, alpha=8)}
# Against another model: where policy and reference are nearly one, rounding to bf16 decides which way β goes.
OTHER = {"reference": "other"} | UNCHECKED
KINDS: dict[str, dict[str, Any]] = {
    "full": EXACT | OTHER,
    "lora": EXACT | LORA,
    "full-bf16": BF16 | OTHER,
    "lora-bf16": BF16 | OTHER | LORA,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    checkpoint(root / "policy")
    checkpoint(root / "other", seed=5)
    write_pairs(root / "trained.parquet", root / "policy", n=21)
    write_pairs(root / "full.parquet", root / "policy", n=20)
    write_base_pairs(root / "pairs.parquet")
    return root


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Child]]:
    """A trainer of two processes of each kind; they import while one process trains."""
    found = {name: start(tmp_path_factory.mktemp(name), *argv) for name, argv in TWO.items()}
    yield found
    for child in found.values():
        child.stop()


@pytest.fixture(scope="module")
def children(started: dict[str, Child], alone: Any) -> dict[str, Child]:
    for child in started.values():
        child.wait_for("ready")
    return started


def job(world: Path, folder: Path, kind: str, **changes: Any) -> TrainJob:
    settings = {"pairs": "trained.parquet", "reference": "policy"} | KINDS[kind]
    settings |= {name: world / settings[name] for name in ("pairs", "reference")} | changes
    return job_of(world, folder, **settings)


@pytest.fixture(scope="module")
def alone(world: Path) -> dict[str, tuple[TrainJob, dict[str, Any]]]:
    """The jobs done by one process, which takes the same micro-batches one after the other, and their results."""
    jobs = {kind: job(world, world / "alone" / kind, kind) for kind in KINDS}
    return {kind: (one, run(one)[0]) for kind, one in jobs.items()}


def weights_of(job: TrainJob) -> torch.Tensor:
    """The trained policy's, in one vector."""
    tensors = load_file(job.out / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", TWO)
def test_two_processes_train_as_one_does(
    world: Path, tmp_path: Path, children: dict[str, Child], alone: dict[str, Any], ranks: str, kind: str
) -> None:
    one, expected = alone[kind]
    two = job(world, tmp_path, kind, processes=2)
    result = children[ranks].order("train", job=two.model_dump(mode="json"))
    assert json.loads((two.work / "job.json").read_text())["world"] == 2
    assert result["steps"] == expected["steps"] == len(result["history"])
    assert result["beta"] == expected["beta"] != two.beta
    rounded = ranks == "fsdp" and two.bf16
    for ours, theirs in zip(result["history"], expected["history"], strict=True):
        assert ours["train/beta"] == theirs["train/beta"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=2e-2 if rounded else 1e-5)
    if two.agreement_mean is not None:
        assert result["agreement"]["tokens"] == expected["agreement"]["tokens"]
    apart = weights_of(two) - weights_of(one)
    if not rounded:
        assert apart.abs().max() <= 1e-6
        return
    # FSDP2 computes all of a layer in bf16, where autocast keeps the sums over layers and the norms in float32. That
    # moves the weights about as far as bf16 itself does: 1.2 times, in the case of all weights.
    exact = job(world, tmp_path / "exact", kind, bf16=False)
    run(exact)
    assert apart.norm() <= 2 * (weights_of(one) - weights_of(exact)).norm()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_save_is_gone_on_from_and_holds_the_weights_once(
    world: Path, tmp_path: Path, children: dict[str, Child], kind: str
) -> None:
    """All weights in fp32, and in bf16 an adapter whose reference is the model below it."""
    bf16 = {"bf16": True, "agreement_mean": 5e-2, "agreement_p99": 0.25} if kind == "lora" else {}
    two = job(world, tmp_path, kind, save_steps=2, **bf16)
    sent = {"job": two.model_dump(mode="json")}
    first = children["fsdp"].order("train", **sent)["history"][0]
    if kind == "lora":
        assert first["train/logratios_chosen"] == 0, "the policy begins as its reference, to the last bit"
    whole, last = bytes_of(two.out), two.work / "checkpoint-6"
    assert {path.name for path in last.iterdir() if path.is_dir()} == {"pytorch_model_fsdp_0", "optimizer_0"}
    assert not [*last.rglob("*.safetensors"), *last.rglob("*.bin")], "the weights lie there once more"
    shutil.rmtree(last)
    seen: list[int] = []
    children["fsdp"].order("train", on_event=lambda event: seen.append(event["step"]), **sent)
    assert list(dict.fromkeys(seen))[-2:] == [5, 6] and min(seen) >= 4  # a slow step tells of its micro-batches too
    assert bytes_of(two.out) == whole


@pytest.mark.parametrize("ranks", TWO)
def test_processes_share_the_pairs_of_the_depth_stage(
    world: Path, tmp_path: Path, children: dict[str, Child], ranks: str
) -> None:
    """Each holds the whole policy, although FSDP loads it on rank 0 alone: features must not be those of zeros."""
    one, two = (features_job(world, tmp_path / name) for name in ("one", "two"))
    alone, child = run_features(one), children[ranks]
    both = child.order("features", job=two.model_dump(mode="json"))
    assert two.out.read_bytes() == one.out.read_bytes()
    assert {k: v for k, v in both.items() if "seconds" not in k} == {
        k: v for k, v in alone.items() if "seconds" not in k
    }
