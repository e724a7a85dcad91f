import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def mini_world() -> Path:
    """The miniature of the tiny world; built once (up to a minute), then found in the cache."""
    out = ROOT / ".cache" / "tiny-mini"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--size", "mini", "--out", str(out)], check=True
    )
    return (out / "current").resolve()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size («256k»), which only root can."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)
