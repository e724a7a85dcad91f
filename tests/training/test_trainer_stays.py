"""A trainer that lives on: what it does for an order is what a fresh process would do."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_depth_job import features_job
from trainer_world import bytes_of, checkpoint, job_of, start, write_pairs

from selfplay.processes.child import Child, ChildDied
from selfplay.processes.reaping import descendants
from selfplay.training import between
from selfplay.training.depth_job import features
from selfplay.training.jobs import FeaturesJob, LoraJob, TrainJob
from selfplay.training.train_job import train

pytestmark = pytest.mark.service

Do = Callable[[Any], Any]  # what carries a job out


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    one = start(tmp_path_factory.mktemp("child"))
    yield one
    one.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    checkpoint(root / "policy")
    write_pairs(root / "pairs.parquet", root / "policy")
    write_pairs(root / "features.parquet", root / "policy", kept_because="base")
    return root


@pytest.fixture(scope="module")
def fresh() -> Iterator[Do]:
    """Carries each job out in a process that has imported what it needs and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["selfplay.training.train_job", "selfplay.training.depth_job"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        yield lambda job: pool.apply(do, (job,))


def do(job: TrainJob | FeaturesJob) -> Any:
    return features(job, silent) if isinstance(job, FeaturesJob) else train(job, silent)


def silent(*told: Any) -> None:
    """Progress that nobody reads."""


def order(child: Child, job: TrainJob | FeaturesJob, **kwargs: Any) -> Any:
    name = "features" if isinstance(job, FeaturesJob) else "train"
    return child.order(name, job=job.model_dump(mode="json"), **kwargs)


def test_orders_in_one_process_give_the_bytes_of_fresh_processes(
    world: Path, tmp_path: Path, child: Child, fresh: Do
) -> None:
    """Full training in mixed precision, gradients of what it made, an adapter on that, and the same policy once more, as
    after a rejected candidate. Each order could leave something to the next: precision, threads, models, the random state
    from which an adapter is drawn.
    """
    again = {"agreement_mean": None, "agreement_p99": None, "epochs": 1}

    def rounds(folder: Path, carry_out: Do) -> dict[str, bytes]:
        first, second = folder / "1" / "out", folder / "2" / "out"
        bf16 = {"bf16": True, "serving_dtype": "bfloat16", "agreement_mean": 0.1, "agreement_p99": None}
        carry_out(job_of(world, folder / "1", save_steps=2, **bf16))
        on_first = {"policy": first, "reference": first}
        carry_out(features_job(world, folder / "g.parquet", pairs=world / "features.parquet", **on_first))
        carry_out(job_of(world, folder / "2", lora=LoraJob(r=4, alpha=8), **on_first, **again))
        carry_out(job_of(world, folder / "3", **on_first, **again))
        carry_out(job_of(world, folder / "4", policy=second, reference=first, lora=LoraJob(r=4, alpha=8), **again))
        outs = {path.parent.name: bytes_of(path) for path in folder.glob("*/out")}
        assert outs.keys() == {"1", "2", "3", "4"}
        found = {f"{name}/{file}": content for name, files in outs.items() for file, content in files.items()}
        found["features"] = (folder / "g.parquet").read_bytes()
        shutil.rmtree(folder)  # the others find the same paths: an adapter names its base
        return found

    child.wait_for("ready")
    order(child, job_of(world, tmp_path / "before", gradient_checkpointing=True))
    stayed, alone = rounds(tmp_path / "rounds", lambda job: order(child, job)), rounds(tmp_path / "rounds", fresh)
    assert stayed.keys() == alone.keys()
    assert [name for name in alone if stayed[name] != alone[name]] == []


def test_the_memory_of_a_trainer_does_not_grow_from_round_to_round(tmp_path: Path, child: Child) -> None:
    """Each round starts from what the one before it made: two models of 6 MB stay, and six would be 24 MB more."""
    wide = checkpoint(tmp_path / "wide", hidden_size=256, intermediate_size=1024)
    write_pairs(tmp_path / "pairs.parquet", wide)
    quick = {"batch_pairs": 12, "micro_batch_pairs": 12, "epochs": 1, "agreement_mean": None, "agreement_p99": None}
    pid = descendants(child.pid)[0]
    held: list[float] = []
    policy = wide
    for index in range(9):
        job = job_of(tmp_path, tmp_path / str(index), policy=policy, reference=policy, initial=wide, **quick)
        order(child, job)
        policy = job.out
        held.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert held[8] - held[2] < 12, held


def test_a_process_that_has_done_other_orders_is_killed_and_a_fresh_one_goes_on(
    world: Path, tmp_path: Path, child: Child, fresh: Do
) -> None:
    calm, job = (job_of(world, tmp_path / name, save_steps=2, epochs=4) for name in ("calm", "killed"))
    fresh(calm)
    pid = descendants(child.pid)[0]

    def kill(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ChildDied, match="SIGKILL"):
        order(child, job, on_event=kill)
    fresh(job)
    assert bytes_of(job.out) == bytes_of(calm.out)


def test_with_a_gpu_the_cores_are_shared_by_the_processes_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They load, cast and copy there, whatever `train.cpu_threads` says: OMP_NUM_THREADS is for machines without one."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    between.Beginning(1)
    assert asked == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for processes in (1, 4, 100):
        between.Beginning(processes)
    assert asked == [12, 3, 1]
