"""The set-up: pins that agree with what asks for them, and what scripts/setup.sh hands to pip and uv."""

import importlib.metadata
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)

# Stands for Python, pip and uv. A venv of it lacks pip when NO_PIP says so; «uv» writes down what it was given.
TOOL = r"""#!/usr/bin/env bash
case "$(basename "$0") $*" in
    uv*) printf '%s\n' "${UV_DEFAULT_INDEX-}" "${UV_INDEX-}" "${UV_INDEX_STRATEGY-}" "${UV_FIND_LINKS-}" > "$SEEN" ;;
    *"-m venv --clear .venv") rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/uv ;;
    *"-m pip --version") [ ! -e .venv/without-pip ] ;;
    *"config get global.extra-index-url") echo "https://one/simple"; echo "https://two/simple" ;;
    *"config get global.index-url") echo "https://mirror/simple" ;;
    *"config get"*) exit 1 ;;
esac
"""


def test_every_pin_is_one_that_pyproject_allows() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["cpu"], *extras["gpu"], *extras["dev"]]:
        wanted = Requirement(text)
        name = wanted.name.lower().replace("_", "-")
        assert name in PINS, f"{text} has no pin in constraints.txt"
        assert wanted.specifier.contains(PINS[name]), (
            f"constraints.txt has {name} {PINS[name]}, pyproject asks for {text}"
        )


@pytest.mark.slow
def test_whatever_the_installed_packages_ask_for_is_pinned_and_allowed() -> None:
    vllm = "gpu" if "vllm" in {d.name for d in importlib.metadata.distributions()} else "cpu"
    extras = PROJECT["project"]["optional-dependencies"]
    left = [Requirement(text) for text in [*PROJECT["project"]["dependencies"], *extras[vllm], *extras["dev"]]]
    kept_out = {Requirement(text).name for text in PROJECT["tool"]["uv"]["override-dependencies"]}
    seen = set()
    while left:
        wanted = left.pop()
        name = wanted.name.lower().replace("_", "-").replace(".", "-")
        if name in kept_out or (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        allowed = SpecifierSet(str(wanted.specifier).replace("+cpu", ""))  # a pin of 2.13.0 takes 2.13.0+cpu too
        assert allowed.contains(PINS[name], prereleases=True), f"{wanted} is not met by {PINS[name]}"
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in {"", *wanted.extras}):
                left.append(needed)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with the set-up script, and a Python that only stands for one."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup.sh", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python").write_text(TOOL)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def set_up(place: Path, **environment: str) -> list[str]:
    """What uv was given: default index, further indexes, strategy, folders of wheels."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    told = {"PYTHON": str(place / "python"), "SEEN": str(place / "seen")} | environment
    subprocess.run([place / "scripts/setup.sh"], check=True, env=clean | told, capture_output=True, timeout=60)
    return (place / "seen").read_text().splitlines()


def test_uv_gets_the_indexes_that_pip_is_configured_with(place: Path) -> None:
    assert set_up(place) == ["https://mirror/simple", "https://one/simple https://two/simple", "unsafe-best-match", ""]


def test_what_the_user_set_for_pip_or_uv_comes_first(place: Path) -> None:
    found = set_up(place, PIP_INDEX_URL="https://env/simple", UV_INDEX="https://mine/simple", PIP_FIND_LINKS="/a /b")
    assert found == ["https://env/simple", "https://mine/simple", "", "/a,/b"]


def test_with_a_gpu_folders_of_wheels_are_not_passed_on_and_a_cpu_build_is_refused(place: Path) -> None:
    (place / "bin").mkdir()
    (place / "bin/nvidia-smi").write_text("#!/bin/sh\n")
    (place / "bin/nvidia-smi").chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as failed:  # the stand-in for torch names no CUDA
        set_up(place, PIP_FIND_LINKS="/a", PATH=f"{place / 'bin'}:{os.environ['PATH']}")
    assert b"torch is a CPU build although there is a GPU" in failed.value.stdout
    assert (place / "seen").read_text().splitlines()[3] == ""


def test_an_environment_that_was_left_without_pip_is_made_anew(place: Path) -> None:
    (place / ".venv/bin").mkdir(parents=True)
    shutil.copy(place / "python", place / ".venv/bin/python")
    (place / ".venv/without-pip").touch()
    set_up(place)
    assert (place / ".venv/bin/uv").exists() and not (place / ".venv/without-pip").exists()
