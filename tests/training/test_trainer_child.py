"""The trainer as a process: killed, given bad orders, out of memory, behind accelerate's launcher."""

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_world import CANARIES, bytes_of, checkpoint, job_of, start
from transformers import AutoModelForCausalLM

from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.reaping import descendants, marked
from selfplay.training.epsilon_dpo import STATE_FILE
from selfplay.training.jobs import CanaryJob, TrainJob
from selfplay.training.train_job import canaries

pytestmark = pytest.mark.service


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Child]]:
    """Two children, which import side by side. Their memory is bounded and their files are looked at by their process id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SELFPLAY_TEMPLATES", raising=False)
        children = [start(tmp_path_factory.mktemp("child")) for _ in range(2)]
    yield children
    for one in children:
        one.stop()


@pytest.fixture(scope="module")
def child(started: list[Child]) -> Child:
    started[0].wait_for("ready")
    return started[0]


def order(child: Child, job: TrainJob, **kwargs: Any) -> Any:
    return child.order("train", job=job.model_dump(mode="json"), **kwargs)


def test_a_killed_trainer_resumes_to_the_same_bytes(
    world: Path, tmp_path: Path, child: Child, started: list[Child]
) -> None:
    victim = started[1]
    calm, job = (job_of(world, tmp_path / name, save_steps=2, epochs=4) for name in ("calm", "killed"))
    undisturbed = order(child, calm)
    victim.wait_for("ready")
    pid = descendants(victim.pid)[0]

    def kill(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ChildDied, match="SIGKILL"):
        order(victim, job, on_event=kill)
    assert not job.out.exists() and (job.work / "checkpoint-6" / STATE_FILE).is_file()
    seen: list[int] = []
    resumed = order(child, job, on_event=lambda event: seen.append(event["step"]) if event["metrics"] else None)
    assert seen[0] in (7, 9) and seen[-1] == 12  # from the save after step 6, or 8 where it was faster than the kill
    assert bytes_of(job.out) == bytes_of(calm.out)
    for name in ("beta", "canaries", "update", "agreement"):
        assert resumed[name] == undisturbed[name]
    strip = [{k: v for k, v in entry.items() if "runtime" not in k} for entry in resumed["history"]]
    assert strip == undisturbed["history"]


def test_the_child_survives_bad_orders_and_answers_canaries(world: Path, tmp_path: Path, child: Child) -> None:
    for sent, kind, words in (
        ({"order": "train", "job": {"beta": -1}}, "input", "beta"),
        (
            {"order": "train", "job": job_of(world, tmp_path, policy=tmp_path).model_dump(mode="json")},
            "input",
            "holds no checkpoint",
        ),
        (
            {
                "order": "train",
                "job": job_of(world, tmp_path).model_dump(mode="json"),
                "files": {str(world / "pairs.parquet"): "0" * 64},
            },
            "internal",
            "seen from .*pairs.parquet is not what its manifest says",
        ),
        ({"order": "nonsense", "job": {}}, "input", "unknown order"),
    ):
        with pytest.raises(ChildError, match=words) as error:
            child.order(**sent)
        assert error.value.kind == kind and (error.value.hint or kind == "internal")
    answers = {
        dtype: child.order("canaries", job={"policy": str(world / "policy"), "dtype": dtype, "canary_ids": CANARIES})
        for dtype in ("float32", "bfloat16")
    }
    model = AutoModelForCausalLM.from_pretrained(world / "policy", dtype=torch.float32)
    by_hand = []
    for ids in CANARIES:
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        by_hand.append(sum(logp[i, token].item() for i, token in enumerate(ids[1:])))
    assert answers["float32"]["canaries"] == pytest.approx(by_hand, rel=1e-5)
    assert answers["bfloat16"]["canaries"] == pytest.approx(answers["float32"]["canaries"], abs=0.5)
    assert answers["bfloat16"] != answers["float32"]
    assert answers["float32"] == canaries(CanaryJob(policy=world / "policy", canary_ids=CANARIES))


def test_out_of_memory_is_said_and_survived(world: Path, tmp_path: Path, child: Child) -> None:
    pid = descendants(child.pid)[0]
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    big = checkpoint(tmp_path / "big", hidden_size=1024, intermediate_size=8192)
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 200_000_000, resource.RLIM_INFINITY))
    with pytest.raises(ChildError, match="out of memory") as error:
        order(child, job_of(world, tmp_path, policy=big, agreement_mean=None, agreement_p99=None))
    assert error.value.kind == "oom" and "micro_batch_pairs" in error.value.hint
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert order(child, job_of(world, tmp_path, epochs=1))["steps"] == 3


@pytest.mark.slow
def test_behind_accelerates_launcher_the_trainer_works_and_dies_with_its_guard(world: Path, tmp_path: Path) -> None:
    """That it dies with its launcher is seen in test_depth_job.py, where one is left."""
    config = Path(__file__).parents[2] / "configs" / "accelerate" / "single.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    child = start(tmp_path / "launched", *launcher, "-m", "selfplay.training.trainer")
    child.wait_for("ready")
    result = order(child, job_of(world, tmp_path, epochs=1))
    assert result["steps"] == 3
    assert len(descendants(child.pid)) == 2  # the launcher and the trainer
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied):
        order(child, job_of(world, tmp_path, epochs=1))
    deadline = time.monotonic() + 20
    while (left := marked(tmp_path / "launched")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
