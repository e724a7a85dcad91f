#!/usr/bin/env python
"""Measure on a GPU, within some minutes, what cannot be known without one: `python scripts/gpu_kit/run.py`.

The parts run in the order of their worth, each as a process of its own with a limit of its own. A part for which too little is
left of `--minutes` is dropped, so the parts of least worth go first. What fails is recorded with its error and the end of its
logs, and the next part begins. `measurements-gpu.md` and `.json` in `--out` (docs/ by default) are written anew after every
figure. Exit code: 0 when every part is done, 3 when one failed, was stopped or was dropped.

`--small` runs every part in miniature, on a CPU too. The kit's `__init__.py` says how to carry all this to a machine that has
no network.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
sys.path[0] = str(SCRIPTS)
sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

from gpu_kit import document, machine, supervise  # noqa: E402
from gpu_kit.sizes import SIZES  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    module: str
    title: str
    about: str
    least: float  # seconds: with fewer left it is dropped
    limit: float  # seconds that it may take


PARTS = (
    Part(
        module="sleep_and_swap",
        title="Sleep, swap and noise",
        about="Memory is what nobody holds on the device. A wake and a swap count until canaries have verified the weights. "
        "Noise is the distance of the same weights in two programs, in nats a token; a window's figure is the size of the mean "
        "over so many tokens, which is what a swap is judged by.",
        least=60,
        limit=200,
    ),
    Part(
        module="whole_round",
        title="A whole round, colocated",
        about="`selfplay round` with LoRA, gradient depth and a reward model of its own, all on one device. The engine sleeps "
        "while the trainer works.",
        least=90,
        limit=200,
    ),
    Part(
        module="training_steps",
        title="Training steps",
        about="Forward, backward, clipping and optimizer in bfloat16 with float32 weights. Lines that say so are extrapolated "
        "from two depths; all others are measured. The peak is that of PyTorch's allocator.",
        least=30,
        limit=110,
    ),
    Part(
        module="throughput",
        title="Tokens a second",
        about="The same engine answers the same prompts, once through the stage with its shards and files, and once all at "
        "once through vLLM alone, which writes nothing. The last turn counts.",
        least=50,
        limit=120,
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="every part in miniature, on a CPU too")
    parser.add_argument(
        "--out", type=Path, help="where the document goes (default: docs/; with --small it must be given)"
    )
    parser.add_argument("--work", type=Path, help="folder for models, runs and logs (default: a temporary one)")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if args.small and args.out is None:
        parser.error("--small needs --out: its figures are no measurements for docs/")
    if not args.small and not machine.gpus():
        parser.error("nvidia-smi finds no GPU here: --small runs every part in miniature on a CPU")
    out: Path = args.out or ROOT / "docs"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        return measure("small" if args.small else "full", args.minutes, deadline, out, work.resolve())


def measure(size: str, minutes: float, deadline: float, out: Path, work: Path) -> int:
    """Run the parts, and write down what they find; returns the exit code."""
    options = f" --minutes {minutes:g}" + (" --small" if size == "small" else "")
    parts: list[dict[str, Any]] = [
        {
            "title": part.title,
            "about": part.about,
            "state": "not begun",
            "seconds": None,
            "findings": [],
            "log_tail": "",
        }
        for part in PARTS
    ]
    found: document.Found = {
        "command": f"python scripts/gpu_kit/run.py{options}",
        "machine": machine.describe(),
        "size": size,
        "parts": parts,
    }
    for name, value in found["machine"].items():
        print(f"{name}: {value}", flush=True)
    print(document.RANDOM, flush=True)
    for number, (part, record) in enumerate(zip(PARTS, parts, strict=True), 1):
        left = deadline - time.monotonic()
        print(f"\n{number} of {len(PARTS)}: {part.title} ({left:.0f} s left)", flush=True)
        if left < part.least and SIZES[size].name == "full":
            record["state"] = f"dropped, since {left:.0f} s were left and it takes at least {part.least:.0f}"
        elif left <= 0:
            record["state"] = "dropped, since no time was left"
        else:
            record["state"] = "begun"
            one(part, record, found, size, min(part.limit, left), out, work)
        print(f"  {record['state']}", flush=True)
        document.write(found, out)
    print(f"\nwritten: {out / document.NAME}.md and .json", flush=True)
    return 0 if all(record["state"] == "done" for record in parts) else 3


def one(
    part: Part, record: dict[str, Any], found: document.Found, size: str, limit: float, out: Path, work: Path
) -> None:
    """Run a part, and keep each of its findings as soon as it is there."""

    def keep(finding: dict[str, Any]) -> None:
        record["findings"].append(finding)
        document.write(found, out)
        told = finding.get("figures") or {"failed": finding.get("error")}
        print(f"  {finding['what']}: " + ", ".join(f"{k} {document.figure(v)}" for k, v in told.items()), flush=True)

    argv = [sys.executable, "-m", "gpu_kit.part", part.module, "--size", size, "--work", str(work)]
    path = os.pathsep.join(p for p in (str(SCRIPTS), os.environ.get("PYTHONPATH", ""), str(ROOT)) if p)
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not machine.gpus():
        env.setdefault(
            "OMP_NUM_THREADS", "1"
        )  # processes that take all cores fight, and a miniature gains nothing by it
    ended = supervise.run(argv, limit, work / f"{part.module}.log", keep, env)
    record["state"] = f"stopped at its limit of {limit:.0f} s" if ended.state == "stopped" else ended.state
    record["seconds"], record["log_tail"] = ended.seconds, ended.log_tail


if __name__ == "__main__":
    sys.exit(main())
