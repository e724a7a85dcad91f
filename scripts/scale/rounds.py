#!/usr/bin/env python
"""What a whole round costs the controller: `python scripts/scale/rounds.py [--prompts 8192 --candidates 8]`.

The real run, stages, generator, scorer and ledger, with stand-ins at the process boundaries: an engine without a model
(`fake_engine.py`: answers of 591 tokens in the mean), a reward server that answers at once, and a trainer that writes what a
trainer would write. They are processes of their own or do nothing, so what is measured is the controller.

    peak_mb        highest resident memory of the controller over the round
    cpu            its processor seconds over the round
    disk_mb        bytes of the round's folder when it is closed
    stages         peak (MB) and processor seconds of each stage
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[2]
for place in (ROOT, ROOT / "scripts"):
    if str(place) not in sys.path:
        sys.path.append(str(place))

from scale.generation import CANARIES, FAKE_ENGINE, write_policy  # noqa: E402
from scale.scoring import WORDS, instant_server  # noqa: E402
from selfplay.config import Config, load  # noqa: E402
from selfplay.generation import installing  # noqa: E402
from selfplay.pairs.writing import read_ranked  # noqa: E402
from selfplay.reporting.terminal import Display  # noqa: E402
from selfplay.rounds.round import run_round  # noqa: E402
from selfplay.rounds.run import Run  # noqa: E402
from selfplay.storage import answers, folders, tables  # noqa: E402
from selfplay.storage.ledger import Store  # noqa: E402
from selfplay.types import Message, PairGradient, Prompt  # noqa: E402

PROMPT_TOKENS = 200
HELD_OUT, AUDIT = 700, 700


def measure(prompts: int, candidates: int, folder: Path) -> dict[str, Any]:
    """The figures of the module's docstring, for one round in a run folder below `folder`."""
    installing.ENGINE = FAKE_ENGINE
    run_dir = folder / "run"
    source = Path(write_policy(folder / "source", 0).path)
    with instant_server() as reward, instant_server() as judge:
        config = _config(prompts, candidates, source, reward, judge)
        run_dir.mkdir(parents=True)
        Store(run_dir).close()  # a run folder has its ledger first
        write_pool(run_dir / "pool", prompts, source)
        watch = Watch()
        with Run(config, run_dir, watch) as run:
            run.trainer = StandIn(run.dir)  # type: ignore[assignment]
            began = time.process_time()
            ended = run_round(run)
            cpu = time.process_time() - began
    stages = {name: figures for name, figures in watch.stages.items() if name not in ("import", "engine")}
    files = [path for path in (run_dir / "rounds" / "0001").rglob("*") if path.is_file()]
    return {
        "prompts": prompts,
        "candidates": candidates,
        "outcome": ended.outcome,
        "pairs": ended.metrics["depth/pairs"],
        "peak_mb": max(peak for peak, _ in stages.values()),
        "cpu": cpu,
        "disk_mb": sum(path.stat().st_size for path in files) / 1e6,
        "stages": stages,
    }


def _config(prompts: int, candidates: int, source: Path, reward: str, judge: str) -> Config:
    return load(
        ROOT / "configs" / "eight-gpu.yaml",
        [
            f"policy.model={source}",
            "prompts.source=unused.jsonl",
            f"prompts.per_round={prompts}",
            f"generate.candidates={candidates}",
            "generate.engines=2",  # as many as two cores take
            "generate.min_engines=1",
            "reward.model=null",
            f"reward.url=[{reward}]",
            "evaluate.judge.model=null",
            f"evaluate.judge.url=[{judge}]",
            "evaluate.gate.reward_up=false",
            "evaluate.gate.win_rate_lower=0",
            "train.accelerate=null",
            "track=none",
        ],
    )


def write_pool(folder: Path, prompts: int, source: Path) -> None:
    """The pool of a run, as its importer would leave it: enough prompts for one round, and some held out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    splits = ["train"] * prompts + ["heldout"] * HELD_OUT + ["audit"] * AUDIT
    with tables.writing(folder / "pool.parquet", Prompt) as file:
        for start in range(0, len(splits), tables.GROUP_ROWS):
            numbers = range(start, min(start + tables.GROUP_ROWS, len(splits)))
            ids = [rng.integers(3, 150_000, PROMPT_TOKENS, np.int32) for _ in numbers]
            texts = [" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 150)) for _ in numbers]
            rows = tables.to_table(
                [
                    Prompt(
                        prompt_id=f"{i:016x}",
                        messages=[{"role": "user", "content": text}],
                        prompt_ids=[],
                        split=splits[i],  # type: ignore[arg-type]
                        source="synthetic",
                    )
                    for i, text in zip(numbers, texts, strict=True)
                ],
                Prompt,
            )
            at = rows.column_names.index("prompt_ids")
            file.table(rows.set_column(at, "prompt_ids", answers.ids_column(ids)))
    initial = {"source": str(source.resolve()), "canaries": {"token_ids": CANARIES, "logps": [-20.0] * len(CANARIES)}}
    folders.write_json(folder / "initial.json", {**initial, "set_aside": {}})


class StandIn:
    """Answers the orders of a trainer without training: a policy with other weights, clusters by chance."""

    alive = True
    apart = False  # it needs no core

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.config: Config | None = None
        self.for_a_round = contextlib.nullcontext

    def start(self) -> None: ...

    def make_room(self) -> None: ...

    def hear(self) -> None: ...

    def stop(self) -> None: ...

    def render(self, policy: Path, trusted: bool, conversations: Sequence[list[Message]]) -> list[list[int]]:
        return [[1] * 100 for _ in conversations]

    def order(
        self,
        name: str,
        job: Any,
        on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
        meanwhile: Callable[[], object] = lambda: None,
        last: bool = True,
    ) -> dict[str, Any]:
        meanwhile()
        if name == "features":
            kept = [pair.prompt_id for pair in read_ranked(job.pairs) if pair.kept_because]
            rng = np.random.default_rng(0)
            table = pa.table(
                {
                    "prompt_id": kept,
                    "cluster": rng.integers(0, 50, len(kept)),
                    "closeness": rng.random(len(kept)),
                    "norm": rng.random(len(kept)),
                }
            )
            with tables.writing(job.out, PairGradient) as file:
                file.table(table)
            return {"clusters": 50.0}
        made = Path(write_policy(self._run_dir / "made", 1).path)
        (made / folders.MANIFEST).unlink()
        made.rename(job.out)
        step = {"step": 1, "train/loss": 0.6}
        return {
            "history": [step], "steps": 1, "beta": job.beta, "agreement": None, "seconds": {},
            "canaries": [-21.0] * len(CANARIES), "update": {"share_changed": 1.0, "relative_norm": 0.01},
        }  # fmt: skip


class Watch(Display):
    """Shows nothing, and notes the peak of the memory and the processor seconds of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.console.quiet = True
        self.stages: dict[str, tuple[float, float]] = {}

    @contextlib.contextmanager
    def stage(self, round_index: int | None, name: str, total: int | None = None, unit: str = "") -> Iterator[Any]:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel counts the peak from here on
        began = time.process_time()
        with super().stage(round_index, name, total, unit) as line:
            yield line
        self.stages[name] = (_memory("VmHWM"), time.process_time() - began)


def _memory(field: str) -> float:
    """A figure of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8192)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--work", type=Path, help="folder for the run; by default a temporary one")
    args = parser.parse_args()
    tables.leave_pandas_out()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = measure(args.prompts, args.candidates, Path(folder))
    found["max_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found, default=lambda value: round(value, 2)))


if __name__ == "__main__":
    main()
