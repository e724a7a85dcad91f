import os
import subprocess
import sys
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
