"""Starts the workers of a build, and puts what they made in its place whole or not at all. No torch in this process."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfplay.worlds.tiny.builder.recipe import Recipe

WORKER = "selfplay.worlds.tiny.builder.worker"
ROOT = Path(__file__).resolve().parents[4]
"""The folder that holds the package selfplay; the workers import it from there."""
Event = dict[str, Any]
"""Progress of the first worker: stage, done, total, and a loss where there is one."""


def read_world(folder: Path) -> dict[str, Any] | None:
    """What a whole world says of itself. None where there is none, or where a power cut left one that is not whole."""
    try:
        world: dict[str, Any] = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return world


def build(recipe: Recipe, target: Path, show: Callable[[Iterator[Event]], None]) -> None:
    """Run the workers, and rename what they made to `target`.

    `show` is handed the progress of the first worker and reads it to its end. Raises RuntimeError when a worker fails.
    """
    from selfplay.storage.folders import sync, sync_tree

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    order = json.dumps(asdict(recipe))
    workers: list[subprocess.Popen[str]] = []
    wall = time.monotonic()
    try:
        for rank in range(recipe.workers):
            with (partial / f"worker{rank}.log").open("w") as log:
                command = [sys.executable, "-P", "-m", WORKER, "--rank", str(rank), "--recipe", order]
                command += ["--out", str(partial), "--parent", str(os.getpid())]
                pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                workers.append(subprocess.Popen(command, stdout=pipe, stderr=log, env=environment, text=True))
        show(events(workers[0]))
        codes = [ended(worker) for worker in workers]
        if any(codes):
            logs = "\n".join((partial / f"worker{rank}.log").read_text()[-2000:] for rank in range(recipe.workers))
            raise RuntimeError(f"a worker failed (exit codes {codes}):\n{logs}")
        world = {
            "hash": target.name,
            "recipe": asdict(recipe),
            "measured": json.loads((partial / "measured.json").read_text()),
            "wall_seconds": round(time.monotonic() - wall, 1),
            "cpu_seconds": round(sum(os.times()[2:4]), 1),
        }
        (partial / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")
        for left in (partial / "measured.json", partial / "rendezvous", *partial.glob("worker*.log")):
            left.unlink(missing_ok=True)
        sync_tree(partial)
        # Somebody else may have built the same world meanwhile: then theirs stays.
        if read_world(target) is None:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync(target.parent)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        shutil.rmtree(partial, ignore_errors=True)


def events(process: "subprocess.Popen[str]") -> Iterator[Event]:
    """What a worker tells of its progress, until its output ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def ended(worker: "subprocess.Popen[str]") -> int | None:
    """The exit code of a worker; None where it hangs although the first worker's output has ended."""
    try:
        return worker.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return None


def sweep(out: Path) -> None:
    """Remove what builds that were killed have left in the folder of worlds."""
    for left in out.glob(".*.*"):
        owner = left.name.rpartition(".")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            if left.is_symlink():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)
