"""What `check` says of a cluster: whether there is room, and in what a node differs. Ray itself is asked in tests/cluster."""

import builtins
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mini import ROOT, TINY

from selfplay.checks import cluster
from selfplay.checks.check import check
from selfplay.cluster import survey
from selfplay.cluster.placing import needs
from selfplay.config import Config, load
from selfplay.errors import ConfigError, InputError

NODE = {"CPU": 8.0, "GPU": 4.0}
TWO_NODES = ROOT / "configs" / "two-nodes.yaml"


def room(config: Config, *nodes: dict[str, float]) -> list[tuple[str, str, str]]:
    return [(found.level, found.about, found.text) for found in cluster.room(config, nodes)]


def tiny(*more: str) -> Config:
    return load(TINY, ["cluster.address=auto", *more])


def test_a_role_takes_what_it_uses_where_there_are_gpus() -> None:
    with_gpus, without = needs(load(TWO_NODES), True), needs(load(TWO_NODES), False)
    assert {role: (need.children, need.gpus) for role, need in with_gpus.items()} == {
        "engine": (6, 1),
        "trainer": (2, 4),
        "reward": (1, 1),
        "judge": (1, 1),
    }
    assert {need.gpus for need in without.values()} == {0}
    assert with_gpus["engine"].strategy == "SPREAD" and with_gpus["trainer"].strategy == "STRICT_SPREAD"
    assert with_gpus["reward"].bundles == [{"CPU": 4, "GPU": 1}]
    assert "judge" not in needs(tiny("evaluate.judge=null"), True)
    spread = needs(tiny("cluster.engine.nodes=2", "generate.engine.tensor_parallel=4", "generate.engines=3"), True)[
        "engine"
    ]
    assert (spread.bundles, spread.workers) == ([{"CPU": 1}] * 3, 8), "vLLM's workers ask for their GPUs themselves"
    served = tiny("reward={url: [http://127.0.0.1:9]}", "evaluate.judge=null")
    assert needs(served, True).keys() == {"engine", "trainer"}, "what others serve takes no room"


def test_room_for_every_child_side_by_side() -> None:
    assert room(load(TWO_NODES), *[{"CPU": 64.0, "GPU": 8.0}] * 2) == [
        (
            "ok",
            "cluster",
            "2 nodes with 128 CPU and 16 GPU have room for engine 6 × 4 CPU and 1 GPU, trainer 2 × 16 CPU and 4 GPU on as many "
            "nodes, reward 1 × 4 CPU and 1 GPU, judge 1 × 4 CPU and 1 GPU",
        )
    ]


@pytest.mark.parametrize(
    ("more", "nodes", "about", "text"),
    [
        (["cluster.engine.gpus=5"], [NODE, NODE], "cluster.engine", "the engine needs 1 × 1 CPU and 5 GPU, and 0 of 2 nodes"),
        (["cluster.reward.cpus=9"], [NODE], "cluster.reward", "the reward needs 1 × 9 CPU and 1 GPU, and 0 of 1 nodes"),
        (["generate.engines=8"], [NODE, NODE], "cluster.engine",
         "11 GPU are needed (engine 8 + trainer 1 + reward 1 + judge 1), the nodes have 8"),
        (["cluster.trainer.nodes=2", f"train.accelerate={ROOT / 'configs/accelerate/fsdp2-4.yaml'}"], [NODE],
         "cluster.trainer", "the trainer needs 2 × 1 CPU and 2 GPU on as many nodes, and 1 of 1 nodes"),
        (["cluster.engine.nodes=2", "generate.engine.tensor_parallel=4"], [NODE, NODE], "cluster.engine",
         "11 GPU are needed (engine 8 + trainer 1 + reward 1 + judge 1), the nodes have 8"),
        (["cluster.engine.nodes=2"], [{"CPU": 8.0}] * 2, "cluster.engine",
         "an engine on several nodes needs GPUs (cluster.engine.nodes): vLLM's Ray executor knows no CPUs"),
    ],
)  # fmt: skip
def test_what_can_never_be_met(more: list[str], nodes: list[dict[str, float]], about: str, text: str) -> None:
    ((level, where, said),) = room(tiny(*more), *nodes)
    assert (level, where) == ("error", about) and said.startswith(text)
    usual = needs(tiny(*more), True)
    said_gpus = [f"cluster.{role}.gpus={need.gpus}" for role, need in usual.items()]
    ((level, _, _),) = room(tiny(*more, *said_gpus, "cluster.autoscaling=true"), *nodes)
    assert level == "warning", "it may grow"


def test_in_what_a_node_differs(tmp_path: Path) -> None:
    file, gone = tmp_path / "nonce", tmp_path / "gone"
    file.write_text("a")
    here = survey.look([str(file)], ["torch", "no-such-package"])
    assert here.packages["torch"] and "no-such-package" not in here.packages and "python" in here.packages
    assert survey.differences(here, survey.look([str(file)], ["torch", "no-such-package"])) == []
    file.write_text("b")
    there = replace(survey.look([str(file)], ["torch"]), packages=here.packages | {"torch": "1.0"})
    assert survey.differences(here, there) == [
        f"{file}: other bytes than here",
        f"torch is 1.0, and {here.packages['torch']} here",
    ]
    absent = survey.look([str(gone)], [])
    gone.write_text("a")
    assert survey.differences(survey.look([str(gone)], []), absent) == [f"{gone}: No such file or directory"]


def test_a_cluster_that_does_not_answer_and_ray_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(TINY, ["cluster.address=127.0.0.1:1"])
    with pytest.raises(InputError, match="no Ray cluster answers at 127.0.0.1:1: .*refused"):
        list(cluster.nodes(config, tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as deaf, monkeypatch.context() as patched:
        patched.setattr("selfplay.cluster.driver.ANSWER", 0.5)
        other = load(TINY, [f"cluster.address=127.0.0.1:{deaf.getsockname()[1]}"])
        with pytest.raises(InputError, match="what listens there did not answer as Ray does"):
            list(cluster.nodes(other, tmp_path))
    whole = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return whole(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "selfplay.cluster.driver", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    (found,) = check(config, tmp_path, [("cluster", cluster.nodes)])
    assert (found.level, found.text) == (
        "error",
        'the section cluster needs Ray, which is not installed; pip install "selfplay[cluster]", on every node',
    )
    assert list(cluster.nodes(load(TINY), tmp_path)) == [], "nothing of Ray is looked for without the section"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["placement={generator: [0]}"], "placement and the GPUs in generate.engines are numbers on one machine"),
        (["generate.engines=[[0], [1]]"], "placement and the GPUs in generate.engines are numbers on one machine"),
        (["cluster.trainer.nodes=2"], "name the processes on them in train.accelerate"),
        (["cluster.engine.gpus=1", "generate.engine.tensor_parallel=2"], "an engine lies on one node"),
        (["cluster.engine.gpus=1", "cluster.engine.nodes=2"], "leave cluster.engine.gpus out"),
        (["cluster.wait=900"], "a child that waits for room would be taken for one that hangs"),
        (["cluster.autoscaling=true", "cluster.engine.gpus=1"], "say how many GPUs each reward has"),
        (["cluster.address=head"], "none of auto, local, ray://host:port and host:port"),
        (["cluster.address=http://head:1"], "none of auto, local, ray://host:port and host:port"),
    ],
)
def test_settings_that_do_not_go_together(more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(*more)
