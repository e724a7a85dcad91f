#!/usr/bin/env python
"""What all checks of integrity cost a warm round of the tiny world: `python scripts/bench_checks.py [--repeats 12]`.

Two controllers run rounds in turns: the product, and a copy of it in which nothing is hashed, sealed, checked against a
checksum or asked whether the run is still this process's. Weights are hashed on both sides, since the swap is verified by them.
One line is printed for each figure: the median of the ratios of two rounds next to each other, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from warm_rounds import Side, in_turns  # noqa: E402

GOAL = 1.03
PAGES = ("storage/tables.py", "training/depth_job.py")
"""Modules that write or read Parquet files with checksums of pages."""
OFF = {
    "storage/hashes.py": """
_read = digest
def digest(path):
    return _read(path) if path.suffix == ".safetensors" else "0" * 64
""",
    "storage/seals.py": """
def finish(partial, path, earlier=True): folders.finish(partial, path)
def seal(path): pass
def is_sealed(path, anew=True, earlier=True): return path.is_file()
def _hash(value): return "0" * 64
""",
    "storage/fences.py": "def check(path): pass\n",
    "storage/hashed_rows.py": "def prepare(connection): pass\ndef begin(connection, before): pass\ndef damaged(connection, every=False): return []\n",
    "storage/lock.py": "RunLock.check = lambda self: None\n",
    "storage/ledger.py": "def _require_ours(connection, lock): pass\n",
    "storage/agreement.py": "def require(store, run_dir, tell): pass\n",
    "storage/closed.py": "def write(folder, store, index, **how): pass\n",
    "storage/wal.py": "def damage(wal): return None\n",
    "rewards/cache.py": "def hash_of(key, score): return bytes(8)\n",
}
"""What is put at the end of modules of the copy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {"without": without_checks(Path(folder) / "code"), "with": ROOT}
        sides = {name: Side(args.config, args.set, Path(folder) / name, root) for name, root in roots.items()}
        found = in_turns(sides, args.repeats)
    for figure in ("round", "CPU"):
        ratios = [one[figure] / other[figure] for one, other in zip(found["with"], found["without"], strict=True)]
        print(
            f"{figure}: with checks ÷ without {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}), goal {GOAL}"
        )


def without_checks(root: Path) -> Path:
    """A copy of the product without checks."""
    for name in ("selfplay", "reward", "scripts", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / ".cache").symlink_to(ROOT / ".cache")  # what a configuration names
    for name, last in OFF.items():
        with (root / "selfplay" / name).open("a") as module:
            module.write(f"\n\n{last}")
    for name in PAGES:
        module_path = root / "selfplay" / name
        text = module_path.read_text()
        assert "page_checksum" in text, f"{name} has no checksums of pages any more"
        for word in ("page_checksum_verification", "write_page_checksum"):
            text = text.replace(f"{word}=True", f"{word}=False")
        module_path.write_text(text)
    return root


if __name__ == "__main__":
    main()
