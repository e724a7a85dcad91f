import contextlib
import fcntl
import functools
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing

from selfplay.processes.protocol import quick_imports

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Whether a power cut leaves a file whole cannot be seen from a test. Without the waits for the disk a third of the quick
# tests' time is saved; the processes that tests start sync as ever.
os.fsync = lambda fd: None


# Typer makes all commands anew for each call, which takes longer than most of the calls.
typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Let children of all processes that tests start be forked from templates (templates/sitecustomize.py).

    Quick tests start none that would be worth it.
    """
    quick = all(f"not {mark}" in session.config.option.markexpr for mark in ("slow", "service"))
    if quick or "PYTEST_XDIST_WORKER" in os.environ or sys.platform != "linux" or "SELFPLAY_NO_TEMPLATES" in os.environ:
        return
    folder = Path(tempfile.mkdtemp(prefix="templates-"))
    templates = ROOT / "tests" / "templates"
    for name in ("vllm", "trl"):
        command = [sys.executable, str(templates / "template.py"), name, str(folder / name)]
        session.config.add_cleanup(subprocess.Popen(command, stdin=subprocess.PIPE).communicate)
    session.config.add_cleanup(lambda: shutil.rmtree(folder))
    os.environ["SELFPLAY_TEMPLATES"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(templates), os.environ.get("PYTHONPATH", "")) if p)


def pytest_runtest_setup() -> None:
    """Each test begins in the root, which configurations name files from, wherever one before it has left the process."""
    os.chdir(ROOT)


# Test modules import what trainer and engine import, and as quickly as they do. It ends with the collection.
collection = contextlib.ExitStack()
collection.enter_context(quick_imports())


def pytest_collection_finish() -> None:
    collection.close()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files whose tests `-m "not …"` drops all: importing what they need takes longer than the quick tests of a package."""
    left_out = set(re.findall(r"not (\w+)", config.option.markexpr))
    if not left_out or collection_path.suffix != ".py" or not collection_path.name.startswith("test_"):
        return None
    marks = re.search(r"^pytestmark = (.*)$", collection_path.read_text(encoding="utf-8"), re.MULTILINE)
    return True if marks and left_out & set(re.findall(r"pytest\.mark\.(\w+)", marks[1])) else None


LONGEST = (  # of the whole run on two cores, from three minutes down to half of one
    "worlds/test_smollm2.py", "rounds/test_disturbed.py", "cluster/test_nodes.py",
    "web/test_page_service.py", "generation/test_generator.py", "web/test_page.py", "rounds/test_round_suites.py",
    "service/test_daemon.py", "publishing/test_publish.py", "rounds/test_round_ahead.py", "reward/test_reward_judge.py",
    "training/test_trainer_stays.py", "generation/test_engines.py", "service/test_daemon_faults.py", "training/test_ranks.py",
    "reward/test_reward_vllm.py", "worlds/test_tiny_builder.py", "web/test_web_bounds.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the mini world; put the longest files first, so that no worker ends alone with one.

    Behind them come those that ask for most time, and at the end those without a slow test, which fill what is left.
    """
    place = {ROOT / "tests" / name: -i for i, name in enumerate(LONGEST)}
    longest: dict[Path, tuple[int, float, bool]] = {}
    for item in items:
        if "mini_world" in getattr(item, "fixturenames", ()):
            item.add_marker("service")
        limit = item.get_closest_marker("timeout")
        heavy = any(item.get_closest_marker(name) is not None for name in ("slow", "service"))
        _, seconds, was_heavy = longest.get(item.path, (0, 0.0, False))
        longest[item.path] = (
            place.get(item.path, -len(place)), max(seconds, limit.args[0] if limit else 0.0), was_heavy or heavy,
        )  # fmt: skip
    items.sort(key=lambda item: longest[item.path], reverse=True)


@pytest.fixture(scope="session")
def mini_world() -> Path:
    """The miniature of the tiny world; built once (up to a minute), then found in the cache."""
    out = ROOT / ".cache" / "tiny-mini"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--size", "mini", "--out", str(out)], check=True
    )
    return (out / "current").resolve()


@pytest.fixture(scope="module")
def calm(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two rounds that nobody disturbed, and what it printed. Made once for all workers; each file has a copy."""
    from mini import CALM, Command, nothing_left, sets

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    original, printed = shared / "calm", shared / "calm.txt"
    with (shared / "calm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.is_file():
            code, out = Command(mini_world, original, "--rounds", "2", "--report", *sets(*CALM)).finish()
            assert code == 0, out
            assert nothing_left(original)
            printed.write_text(out)
    run_dir = shutil.copytree(original, tmp_path_factory.mktemp("calm") / "run", symlinks=True)
    return run_dir, printed.read_text()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Mounts disks of a given size («256k»), which only root can."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        disk = tmp_path_factory.mktemp("disk")
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """A process that has so many descriptors open that each new one has a number that select would not take."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    held = [os.open("/dev/null", os.O_RDONLY)]
    while held[-1] < 1024:
        held.append(os.open("/dev/null", os.O_RDONLY))
    yield
    for descriptor in held:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes daemons that decide on rounds which only pretend (daemon_world.World); opened, as after a start."""
    from daemon_world import World

    made: list[World] = []

    def make(*more: str) -> World:
        made.append(World(tmp_path / "run", monkeypatch, *more))
        return made[-1].opened()

    yield make
    for each in made:
        each.store.close()


@pytest.fixture(scope="module")
def served(mini_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts services (daemon_world.Served) on the miniature; none of their processes outlives the file's tests."""
    from daemon_world import Served
    from mini import nothing_left

    started: list[Served] = []

    def start(*more: str, run_dir: Path | None = None, **config: Path) -> Served:
        started.append(Served(mini_world, run_dir or tmp_path_factory.mktemp("served") / "run", *more, **config))
        return started[-1]

    yield start
    for each in started:
        if each.thread.is_alive():
            each.stop()
        each.store.close()
    for each in started:
        assert nothing_left(each.run_dir)
