"""How the trainer is started, kept, told and ended beside the engine, over a child that only answers as told."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trainer import COLOCATED, FakeChild, World
from mini import TINY
from safetensors.numpy import save_file

from selfplay.config import load
from selfplay.errors import InputError, Interrupted, TrainError
from selfplay.processes.child import ChildDied, ChildError
from selfplay.storage import hashes
from selfplay.training import service
from selfplay.training.jobs import CLUSTERS, CanaryJob, TrainJob
from selfplay.training.service import STARTS

JOB = CanaryJob(policy=Path("p"), canary_ids=[])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setattr(service, "Child", FakeChild)
    return lambda *settings: World(tmp_path, *settings)


def test_a_trainer_that_dies_is_started_once_more_and_told_once(world: Any, tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_text("loading\nout of patience\n")
    died = ChildDied("trainer", "was killed by SIGKILL", log)
    w = world().ends(died, {"steps": 3})
    assert w.trainer.order("canaries", JOB) == {"steps": 3}
    assert [kind for kind, _ in w.events] == ["trainer_restart"]
    assert "resumes from its last save" in w.events[0][1]
    assert w.log == ["start", "send canaries", "stop", "start", "send canaries"]
    w = world().ends(*[died] * STARTS)
    with pytest.raises(TrainError, match=r"SIGKILL; the last it said: out of patience") as error:
        w.trainer.order("canaries", JOB)
    assert error.value.kind == "died" and "same command" in error.value.hint


def test_a_trainer_elsewhere_is_told_the_hashes_of_what_it_reads_and_has_a_second_try(
    world: Any, tmp_path: Path
) -> None:
    for name in ("pairs", "policy/config.json", "policy/masters/config.json", "initial/tokenizer.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for folder in ("policy", "policy/masters"):
        save_file({"w": np.zeros(1)}, tmp_path / folder / "model.safetensors")
    named = {name: tmp_path / name for name in ("pairs", "policy", "initial", "work", "out")}
    job = TrainJob(
        **named,
        reference=tmp_path / "policy",
        beta=0.1,
        learning_rate=1,
        batch_pairs=1,
        micro_batch_pairs=1,
        max_length=9,
    )
    read = ["pairs", "policy/masters/config.json", "policy/masters/model.safetensors", "policy/config.json",
            "initial/tokenizer.json"]  # fmt: skip
    late = ChildError("trainer", "internal", "seen from node2: pairs is missing", "", tmp_path / "x")
    seen: list[Any] = []
    w = world().ends(late, lambda order, fields, on_event: seen.append(fields) or {"steps": 3})
    w.trainer._place = object()
    assert w.trainer.order("train", job) == {"steps": 3}
    assert seen[0]["files"] == {str(tmp_path / name): hashes.sha256(tmp_path / name) for name in read}
    w = world().ends(late)
    with pytest.raises(TrainError, match="pairs is missing"):  # beside the controller it is an error
        w.trainer.order("train", job)


def test_a_process_of_several_that_dies_is_a_death_whatever_the_others_say_of_it_once(
    world: Any, tmp_path: Path
) -> None:
    """Those that are left fail in a collective call, and say so before the launcher ends."""
    several = tmp_path / "several.yaml"
    several.write_text("")
    reset = ChildError("trainer", "internal", "RuntimeError: Connection reset by peer", "see the log", tmp_path / "x")
    w = world(f"train.accelerate={several}").ends(reset, {"steps": 3})
    assert w.trainer.order("canaries", JOB) == {"steps": 3}
    assert w.log == ["start", "send canaries", "stop", "start", "send canaries"]
    assert [kind for kind, _ in w.events] == ["trainer_restart"] and "reset by peer" in w.events[0][1]
    w.ends(*[reset] * STARTS)
    with pytest.raises(TrainError, match="reset by peer") as error:
        w.trainer.order("canaries", JOB)
    assert (error.value.kind, error.value.hint) == ("internal", "see the log")
    alone = world().ends(reset, {})
    with pytest.raises(TrainError, match="reset by peer"):
        alone.trainer.order("canaries", JOB)
    assert alone.events == []


def test_an_order_that_fails_is_no_reason_for_a_second_try(world: Any, tmp_path: Path) -> None:
    failed = ChildError("trainer", "oom", "out of memory: 3 GiB", "lower micro_batch_pairs", tmp_path / "x")
    w = world().ends(failed, {})
    with pytest.raises(TrainError, match="out of memory") as error:
        w.trainer.order("canaries", JOB)
    assert (error.value.kind, error.value.hint, w.events) == ("oom", "lower micro_batch_pairs", [])


def test_a_trainer_that_died_while_it_waited_is_started_and_told(world: Any) -> None:
    w = world().ends({"steps": 1})
    waiting = w.trainer.start()
    assert w.trainer.alive and w.trainer.start() is waiting and w.log == ["start"]
    waiting.alive = False
    assert not w.trainer.alive
    assert w.trainer.order("canaries", JOB) == {"steps": 1}
    assert [kind for kind, _ in w.events] == ["trainer_restart"] and "while it waited" in w.events[0][1]
    w.trainer.stop()
    assert not w.trainer.alive
    w.trainer.start()
    assert len(w.events) == 1  # one that was ended on purpose is no news


def test_beside_a_trainer_with_gpus_of_its_own_the_engine_works(world: Any) -> None:
    w = world().ends({})
    w.trainer.order("canaries", JOB, meanwhile=lambda: w.log.append("engine works"))
    assert w.log == ["start", "send canaries", "engine works"]


def test_on_a_cpu_the_engine_works_beside_a_trainer_that_leaves_it_a_core_and_else_before_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cores, of which the engine takes one. By default the trainer takes all that it may use."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 4, 6})
    beside, before = ["start", "send canaries", "engine works"], ["engine works", "start", "send canaries"]
    for threads, gpu, expected in (
        ("3", False, beside),
        ("4", False, before),
        ("null", False, before),
        ("4", True, beside),
    ):
        monkeypatch.setattr("selfplay.training.service.gpus.count", lambda gpu=gpu: int(gpu))
        w = world(f"train.cpu_threads={threads}").ends({})
        w.trainer.order("canaries", JOB, meanwhile=lambda w=w: w.log.append("engine works"))
        assert w.log == expected, (threads, gpu)
        assert FakeChild.env[-1]["OMP_NUM_THREADS"] == threads.replace("null", "4")


def test_a_trainer_stays_from_round_to_round_and_ends_where_it_is_not_to_stay(world: Any, tmp_path: Path) -> None:
    single = tmp_path / "single.yaml"
    single.write_text("")
    for settings, stays in (((), True), (("train.stay=false",), False), ((f"train.accelerate={single}",), False)):
        w = world(*settings).ends({}, {})
        for _ in range(2):
            with w.trainer.for_a_round():
                w.trainer.order("canaries", JOB)
        once, ended = ["start", "send canaries"], ["start", "send canaries", "stop"]
        assert w.log == ([*once, "send canaries"] if stays else ended * 2)
        assert w.events == []


def test_a_trainer_ends_with_a_round_that_fails(world: Any) -> None:
    """It may be in the middle of an order, and the next one would wait for it."""
    w = world().ends({})
    for error in (Interrupted("now", now=True), KeyboardInterrupt(), TrainError("oom", "out of memory")):
        w.trainer.start()
        with pytest.raises(type(error)), w.trainer.for_a_round():
            raise error
        assert not w.trainer.alive and w.events == []


def test_where_they_share_a_gpu_the_engine_works_first_and_sleeps_while_the_trainer_works(world: Any) -> None:
    w = world(*COLOCATED).ends({}, {}, {})

    def order(**settings: Any) -> list[str]:
        w.log.clear()
        w.trainer.order("canaries", JOB, meanwhile=lambda: w.log.append("engine works"), **settings)
        return list(w.log)

    assert order(last=False) == ["engine works", "engine sleeps", "start", "send canaries"]
    assert order() == ["engine works", "engine sleeps", "send canaries", "engine wakes"]
    w.engine.loaded = False  # without a policy it holds no memory
    assert order() == ["engine works", "send canaries"]


def test_where_they_share_a_gpu_a_trainer_that_does_not_stay_ends_before_the_engine_wakes(world: Any) -> None:
    w = world(*COLOCATED, "train.stay=false").ends({}, {}, {})

    def order(**settings: Any) -> list[str]:
        w.log.clear()
        w.trainer.order("canaries", JOB, meanwhile=lambda: w.log.append("engine works"), **settings)
        return list(w.log)

    assert order(last=False) == ["engine works", "engine sleeps", "start", "send canaries"]
    assert order() == ["engine works", "engine sleeps", "send canaries", "stop", "engine wakes"]
    w.engine.loaded = False  # without a policy it holds no memory
    assert order() == ["engine works", "start", "send canaries", "stop"]


def test_how_a_trainer_is_started_follows_the_configuration_of_now(world: Any, tmp_path: Path) -> None:
    w = world("train.cpu_threads=3").ends()
    w.trainer.start()
    assert FakeChild.argv[-1][1:] == ["-m", "selfplay.training.trainer"]
    assert FakeChild.env[-1]["OMP_NUM_THREADS"] == "3" and "CUDA_VISIBLE_DEVICES" not in FakeChild.env[-1]
    single = tmp_path / "single.yaml"
    single.write_text("")
    assert w.trainer.start() is w.trainer.start()
    w.trainer.config = load(TINY, [f"train.accelerate={single}", "breadth.method=clusters", "placement.trainer=[1, 2]"])
    w.log.clear()
    w.trainer.start()  # anew: the one that waits was started in another way
    assert w.log == ["stop", "start"] and w.events == []
    launched = ["-m", "accelerate.commands.launch", "--config_file", str(single), "-m", "selfplay.training.trainer"]
    assert FakeChild.argv[-1][1:] == [*launched, CLUSTERS]
    assert FakeChild.env[-1]["CUDA_VISIBLE_DEVICES"] == "1,2"
    single.unlink()
    w.trainer.stop()
    with pytest.raises(InputError, match=r"train\.accelerate: .*single\.yaml: no such file"):
        w.trainer.start()


def test_conversations_are_rendered_by_the_trainer_that_waits(world: Any, tmp_path: Path) -> None:
    refused = ChildError("trainer", "input", "no chat template", "give the policy one", tmp_path / "x")
    w = world().ends(lambda order, fields, tell: [fields["policy"], len(fields["conversations"])], refused)
    w.trainer.start()
    asked = [[{"role": "user", "content": "?"}]]
    assert w.trainer.tokenize("render", policy="/p", conversations=asked) == ["/p", 1]
    with pytest.raises(InputError, match="no chat template") as error:
        w.trainer.tokenize("render", policy="/p", conversations=[])
    assert error.value.hint == "give the policy one"
