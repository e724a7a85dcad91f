"""The files that start a cluster, as far as they can be looked at without one: options, commands, paths and versions."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from mini import ROOT
from typer.main import get_command

from selfplay import cli
from selfplay.cluster.placing import needs
from selfplay.config import load

DEPLOY = ROOT / "configs" / "deploy"
FILES = ("ray-nodes.sh", "slurm.sh", "rayjob.yaml", "skypilot.yaml")
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def text(name: str) -> str:
    """The file without its comments, continued lines joined."""
    lines = [line for line in (DEPLOY / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def containers(group: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = group["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def options() -> set[str]:
    """What `ray start` knows."""
    said = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"], capture_output=True, text=True
    )
    return set(re.findall(r"--[\w-]+", said.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_ray_and_selfplay_know_the_commands_and_their_options(name: str, options: set[str]) -> None:
    starts = re.findall(r"ray start ([^|;&\n]*)", text(name))
    used = {option for line in starts for option in re.findall(r"--[\w-]+", line)}
    assert "--head" in options and used <= options
    commands = re.findall(r"\bselfplay (serve|round|check)\b", text(name) + (DEPLOY / name).read_text())
    assert commands and set(commands) <= set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert name in PAGE, "the page names it"


@pytest.mark.parametrize(("name", "shell"), [("ray-nodes.sh", "sh"), ("slurm.sh", "bash"), ("skypilot.yaml", "sh")])
def test_what_a_shell_runs_is_shell(name: str, shell: str) -> None:
    whole = (DEPLOY / name).read_text()
    for script in [whole] if name.endswith(".sh") else [yaml.safe_load(whole)[part] for part in ("setup", "run")]:
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_a_machine_is_told_what_it_is() -> None:
    script = [str(DEPLOY / "ray-nodes.sh")]
    done = subprocess.run(script, capture_output=True, text=True, env={"HEAD": "10.0.0.1", "PATH": "/usr/bin:/bin"})
    assert (done.returncode, "head|node" in done.stderr) == (2, True)
    done = subprocess.run([*script, "head"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode != 0 and "address of the first machine" in done.stderr


def test_slurm_gives_the_service_the_time_that_it_needs_to_end() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (DEPLOY / "slurm.sh").read_text(), re.MULTILINE))
    before = int(options["signal"].rpartition("@")[2])
    drains = [load(path).service.drain_seconds for path in (ROOT / "configs").glob("*.yaml")]
    assert before >= max(drains) + 30 and "requeue" in options and options["open-mode"] == "append"
    assert "scontrol requeue" in text("slurm.sh")


def test_the_pods_of_kuberay_share_the_run_folder_and_the_image() -> None:
    job, policy = yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({container["image"] for group in groups for container in containers(group)}) == 1
    config = job["spec"]["entrypoint"].split()[-1]
    for group in groups:
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        for container in containers(group):
            mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert mounted["/shared"] == "shared" and set(mounted.values()) <= volumes
            assert str(Path(config).parent) in mounted
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    assert "ray.io/cluster" in str(policy["spec"]["podSelector"])


def test_skypilot_starts_a_ray_of_its_own() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    assert task.keys() <= {"name", "num_nodes", "resources", "workdir", "volumes", "envs", "setup", "run"}
    assert task["envs"]["PORT"] not in ("6380", "6379"), "where Ray of SkyPilot is, or another one"
    assert set(re.findall(r"SKYPILOT_\w+", task["run"])) <= {
        "SKYPILOT_NODE_IPS",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_GPUS_PER_NODE",
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[([\w,]+)\]", task["setup"])[0].split(",")) <= extras.keys()


def test_the_configuration_of_two_machines_uses_all_of_their_gpus() -> None:
    config = load(ROOT / "configs" / "two-nodes.yaml")
    assert sum(need.children * need.gpus for need in needs(config, with_gpus=True).values()) == 16
