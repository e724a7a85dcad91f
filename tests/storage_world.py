"""A run folder without models, for what opens and mends folders: manifests, ledger and the files that they name."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from selfplay.prompts import sealing
from selfplay.storage import agreement, closed, folders, hashes, seals
from selfplay.storage import policies as checkpoints
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest, Policies

STAGES = ("prompts", "generate", "score")


def finished(run_dir: Path, rounds: int) -> Path:
    """A run folder with so many promoted rounds, each with a policy of a few bytes. It is made once, and copied for each test."""
    return shutil.copytree(_once(rounds), run_dir, symlinks=True)


@cache
def _once(rounds: int) -> Path:
    root = Path(tempfile.mkdtemp(prefix="finished-"))
    atexit.register(shutil.rmtree, root)
    return make(root / "run", rounds)


def make(run_dir: Path, rounds: int) -> Path:
    """What `finished` is a copy of, made anew."""
    run_dir.mkdir()
    store, policies = Store(run_dir), Policies(run_dir)
    store.open_run("tiny", {"run.seed": 0})
    for version in range(rounds + 1):
        folder = policies.folder(version)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes([version]) * 64)
        checkpoints.write(folder, manifest(version, folder))
    (run_dir / "pool" / "prompts").mkdir(parents=True)
    (run_dir / "pool" / "initial.json").write_text("{}", encoding="utf-8")
    sealing.seal(run_dir / "pool")
    store.record_policy(0, "initial", round=0)
    agreement.set_current(store, policies, 0)
    for index in range(1, rounds + 1):
        add_round(store, run_dir, index)
    store.close()
    return run_dir


def manifest(version: int, folder: Path) -> Manifest:
    return Manifest(
        version=version, parent=version - 1 if version else None, round=version, beta=0.09 if version else None,
        reference=0 if version else None, reference_sha256=None, fingerprint="f" * 64, packages={}, update={},
        files=hashes.hash_files(folder), canaries={},
    )  # fmt: skip


def add_round(store: Store, run_dir: Path, index: int) -> None:
    """A round that promoted its policy."""
    store.open_round(index, index - 1, (0, 4 * (index - 1)), "f" * 64, {"run": {"name": "tiny", "seed": 0}})
    for stage in STAGES:
        folder = run_dir / "rounds" / f"{index:04d}" / stage
        folder.mkdir(parents=True)
        (folder / "rows.txt").write_text(f"{stage} {index}", encoding="utf-8")
        sign(folder, index, count=float(index), reward_mean=0.5)
        store.record_stage(index, stage, 1.5, {"count": float(index), "reward_mean": 0.5})
    store.record_policy(index, "promoted", round=index, parent=index - 1, reference=0, beta=0.09)
    agreement.set_current(store, Policies(run_dir), index)
    closed.write(run_dir / "rounds" / f"{index:04d}", store, index, state="promoted", policy=index, reasons=[])
    store.close_round(index, "promoted", index, [])


def sign(stage: Path, index: int, **metrics: float) -> None:
    """Write the manifest of a stage over the files that its folder has now."""
    said = {"stage": stage.name, "round": index, "fingerprint": "f" * 64, "seconds": 1.5, "metrics": metrics}
    seals.write_json(stage / folders.MANIFEST, {**said, "files": hashes.hash_files(stage)})


def flip(path: Path, place: int, bit: int = 2) -> None:
    """Flip one bit of a file; its time of change stays, as where a disk does it."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
