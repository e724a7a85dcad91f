"""Unit, container file and operations page agree with each other and with what they are about."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from mini import ROOT
from prometheus_client import REGISTRY
from served_world import Progress, build, config
from typer.main import get_command

from reward.serving import descriptors
from selfplay import cli
from selfplay.config import ServiceConfig, load
from selfplay.web import metrics as prometheus
from selfplay.web.view import View

DEPLOY = ROOT / "configs" / "deploy"
UNIT, CONTAINER = (DEPLOY / "selfplay.service").read_text(), (DEPLOY / "Containerfile").read_text()
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
GRACE = 30  # seconds to end children and server after the drain


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match.group(1)


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) of the container file, continued lines joined."""
    lines = [line for line in CONTAINER.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """But for the program and the user, which are not on this machine."""
    here = UNIT.replace("/opt/selfplay/.venv/bin/selfplay", "/bin/true").replace("User=selfplay", "User=root")
    unit = tmp_path / "selfplay.service"
    unit.write_text(here)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(here.replace("WatchdogSec=", "WatchdogSeconds="))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert "WatchdogSeconds" in done.stderr


def test_the_unit_asks_for_what_the_service_says() -> None:
    assert "Type=notify\n" in UNIT and "WatchdogSec=" in UNIT and "Restart=on-failure" in UNIT


def test_the_unit_grants_the_descriptors_that_the_service_asks_for() -> None:
    assert int(found(r"^LimitNOFILE=(\d+)$", UNIT)) == descriptors.MOST


def test_whoever_stops_the_service_waits_longer_than_it_drains() -> None:
    drains = [load(path).service.drain_seconds for path in (ROOT / "configs").glob("*.yaml")]
    assert int(found(r"^TimeoutStopSec=(\d+)$", UNIT)) >= max(drains) + GRACE
    assert int(found(r"--stop-timeout (\d+)", CONTAINER)) >= max(drains) + GRACE


def test_the_image_has_what_is_copied_and_nothing_else() -> None:
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_the_image_is_built_with_extras_that_there_are() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for several in re.findall(r"EXTRA=([\w,]+)", CONTAINER) for extra in several.split(",")}
    assert {"cpu", "gpu", "wandb"} <= named <= extras.keys()


def test_what_the_image_runs_is_shell() -> None:
    scripts = [rest for word, rest in instructions() if word == "RUN"]
    assert scripts
    for script in scripts:
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_models_of_the_hub_are_kept_in_the_volume() -> None:
    volume = Path(found(r"^VOLUME (\S+)$", CONTAINER))
    assert volume in Path(found(r"HF_HOME=(\S+)", CONTAINER)).parents
    assert f"-v selfplay-runs:{volume} " in CONTAINER


def test_unit_and_container_are_given_the_same_secrets() -> None:
    secrets = set(re.findall(r"[A-Z]+_(?:TOKEN|WEBHOOK)", UNIT))
    assert len(secrets) == 3 and set(re.findall(r"-e (\w+)", CONTAINER)) == secrets


def test_the_health_check_asks_the_port_that_the_service_has() -> None:
    (check,) = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    assert int(found(r"127\.0\.0\.1:(\d+)/readyz", check)) == ServiceConfig().port


@pytest.fixture
def samples(tmp_path: Path) -> set[str]:
    """Names of all that /metrics has of a run, and of the process."""
    store = build(tmp_path / "run", rounds=2, pairs=4)
    view = View(tmp_path / "run", config(), Progress())
    names = {s.name for family in prometheus.registry(view).collect() for s in family.samples}
    view.store.close()
    store.close()
    return names | {s.name for family in REGISTRY.collect() for s in family.samples}


def test_the_alert_rules_ask_for_metrics_and_states_that_there_are(samples: set[str]) -> None:
    (block,) = re.findall(r"^```yaml\n(groups:(?:.|\n)*?)^```$", PAGE, re.MULTILINE)
    rules = [rule for group in yaml.safe_load(block)["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    asked = {name for rule in rules for name in re.findall(r"\b(?:selfplay|process)_\w+", rule["expr"])}
    assert asked and asked <= samples
    states = {
        state
        for rule in rules
        for either in re.findall(r'state=~?"([^"]+)"', rule["expr"])
        for state in either.split("|")
    }
    assert states and states <= set(prometheus.STATES)


def test_commands_and_settings_of_the_page_exist() -> None:
    code = [a or b for a, b in re.findall(r"`([^`\n]+)`|^    (.+)$", PAGE, re.MULTILINE)]
    known = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    commands = {name for text in code for name in re.findall(r"(?:^|until )selfplay ([a-z][a-z-]*)", text)}
    assert {"check", "serve", "pause", "resume"} <= commands <= known
    settings = {name for text in code for name in re.findall(r"^service\.(?!log$)([a-z_]+)$", text)}
    assert settings and settings <= set(ServiceConfig.model_fields)
