#!/usr/bin/env python
"""What the pool of prompts costs: `python scripts/scale/prompts.py [--import 100000] [--draw 1000000]`.

The import reads a JSONL file of prompts of about 430 tokens with a tokenizer of 1,024 tokens that is trained on their words,
as the importer's child does, in as many processes as there are processors for it.

    import_wall, import_cpu   seconds, all processes together
    import_grown_mb           how far the peak of the memory of all processes together rose (shared pages count once)

The draw takes a round of 8,192 prompts of a pool of 1,000,000, which is written from 20,000 different ones.

    open             the pool, in a new process: seconds of the processor, as all that follow
    first_order      the order of an epoch that no file has yet; once an epoch
    draw             8,192 prompts of it, by the ledger, and the record of them there
    write, read_512  8,192 prompts to the file of the stage, and 512 of the gate as records
    draw_and_write   draw and write together, by the clock
    add              one prompt that joins: whether it is new, and its file
    draw_grown_mb    how far the peak of the resident memory rose over all of this
    pool_mb          on disk
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

from selfplay.config import BreadthConfig, PromptsConfig, load  # noqa: E402
from selfplay.models.rendering import Renderer, Template  # noqa: E402
from selfplay.prompts import admission, draw, importer, parts, rows  # noqa: E402
from selfplay.prompts import pool as pools  # noqa: E402
from selfplay.prompts.draws import Draws  # noqa: E402
from selfplay.prompts.formats import canonical  # noqa: E402
from selfplay.prompts.held_out import asked  # noqa: E402
from selfplay.prompts.orders import Orders  # noqa: E402
from selfplay.seeds import derive  # noqa: E402
from selfplay.storage import tables  # noqa: E402
from selfplay.storage.ledger import Store  # noqa: E402
from selfplay.types import Prompt  # noqa: E402

Found = TypeVar("Found")
PROMPT_WORDS, PROMPT_TOKENS = 128, 434
WORDS = ["".join(random.Random(i).choices("etaoinshrdlucmf", k=2 + i % 9)) for i in range(5000)]
DIFFERENT = 20_000  # prompts of which a large pool is made; the numbers in front of them differ


def measure_import(prompts: int) -> dict[str, float]:
    """The figures of the import in the module's docstring, for so many prompts."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tables.leave_pandas_out()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "prompts.jsonl", Path(folder) / "pool"
        with source.open("w") as file:
            file.writelines(json.dumps({"prompt": _text(i)}) + "\n" for i in range(prompts))
        out.mkdir()
        config = load(
            ROOT / "configs" / "eight-gpu.yaml",
            [f"prompts.source={source}", "prompts.heldout=null"],
        )
        render = Renderer(_tokenizer(), Template(today=date(2026, 1, 1)))
        render([[{"role": "user", "content": "Hello."}]])
        began, cpu, memory = time.perf_counter(), _cpu(), _memory()
        with _peak() as peak:
            splits, _ = importer.import_pool(config, render, out, Path(folder) / "parts")
        assert splits.total() == prompts
        return {
            "import_wall": time.perf_counter() - began,
            "import_cpu": _cpu() - cpu,
            "import_grown_mb": max(peak) - memory,
            "tokens": sum(len(p.prompt_ids) for p in itertools.islice(pools.Pool(out), 100)) / 100,
        }


def measure_draw(prompts: int) -> dict[str, float]:
    """The figures of the draw in the module's docstring, for a pool of so many prompts."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        _write_pool(run_dir / "pool", prompts)
        with get_context("spawn").Pool(1) as process:  # the memory of this one tells of the pool's making
            found: dict[str, float] = process.apply(_draw, (run_dir,))
        found["pool_mb"] = sum(f.stat().st_size for f in run_dir.rglob("*") if f.is_file()) / 1e6
        return found


def _draw(run_dir: Path) -> dict[str, float]:
    tables.leave_pandas_out()  # as the controller does
    store, figures = Store(run_dir), dict[str, float]()
    settings = PromptsConfig(source="x", per_round=8192)
    before = _peak_so_far()

    def timed(name: str, work: Callable[[], Found]) -> Found:
        began = time.process_time()
        found = work()
        figures[name] = time.process_time() - began
        return found

    pool = timed("open", lambda: pools.Pool(run_dir / "pool"))
    draws = Draws(pool, store, run_dir / "rounds", Orders(0, run_dir / "pool" / pools.ORDERS))
    timed("first_order", lambda: draws.orders.order(0, pool.training()[0]))
    for index in (1, 2, 3):  # the last one counts: a round of a service that runs
        out = run_dir / "rounds" / f"{index:04d}" / "prompts"
        out.mkdir(parents=True)
        began = time.perf_counter()
        whole = time.process_time()
        store.open_round(index, 0, draws.cursor(index), "", {})
        draw.prompts(
            out, _Line(), pool=pool, draws=draws, index=index, settings=settings, breadth=BreadthConfig(), embed=None
        )
        draws.record(index)
        figures["draw_and_write"] = time.perf_counter() - began
        figures["draw"] = time.process_time() - whole
    drawn = tables.read_column(out / "prompts.parquet", "prompt_id")
    assert len(set(drawn)) == 8192
    timed("write", lambda: pool.write(drawn, run_dir / "again.parquet"))
    figures["draw"] -= figures["write"]
    timed("read_512", lambda: pool.read(draw.subset(pool.ids("heldout"), 512, 1, "gate")))
    fates = timed("add", lambda: _add(pool))
    assert fates == 1
    figures["draw_grown_mb"] = _peak_so_far() - before
    store.close()
    return figures


def _add(pool: pools.Pool) -> int:
    def render(conversations: Any) -> list[list[int]]:
        return [[1] for _ in conversations]

    row = {"prompt": "A prompt that the pool does not have, in so many words."}
    settings = {"max_tokens": 9, "ngram": 8, "overlap": 0.5, "source": "x", "joined": 9, "benchmarks": {}}
    found = admission.admit([row], pool, render, **settings)  # type: ignore[arg-type]
    return pool.join(p for p in found if isinstance(p, Prompt))


class _Line:
    """Nobody looks at the progress."""

    round_index: int | None = None
    name = unit = text = ""
    done, seconds = 0, 0.0
    total: int | None = None

    def update(self, *, done: int | None = None, text: str | None = None, total: int | None = None) -> None:
        return


def _text(number: int) -> str:
    return f"{number} " + " ".join(random.Random(number % DIFFERENT).choices(WORDS, k=PROMPT_WORDS))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((_text(i) for i in range(500)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    return tokenizer


def _write_pool(folder: Path, prompts: int) -> None:
    """A pool as the importer would write it: every twentieth prompt is held out."""
    (folder / pools.PROMPTS).mkdir(parents=True)
    rng = np.random.default_rng(0)
    different = [_text(i).partition(" ")[2] for i in range(DIFFERENT)]
    words = [asked([{"role": "user", "content": text}]).view(np.int32) for text in different]
    with rows.writing(folder / pools.FACTS, parts.FACTS) as facts:
        for start in range(0, prompts, parts.FACT_ROWS):
            numbers = range(start, min(start + parts.FACT_ROWS, prompts))
            messages = [[{"role": "user", "content": f"{i} {different[i % DIFFERENT]}"}] for i in numbers]
            hashes = [derive(canonical(m)) for m in messages]
            made = [
                Prompt(
                    prompt_id=f"{own:016x}", messages=m, prompt_ids=[], source="prompts.jsonl",
                    split="heldout" if i % 20 == 0 else "train",
                )
                for i, m, own in zip(numbers, messages, hashes, strict=True)
            ]  # fmt: skip
            ids = list(rng.integers(0, 150_000, (len(made), PROMPT_TOKENS), np.int32))
            rows.write(folder / pools.PROMPTS / f"{start:09d}.arrow", rows.filled(parts.table_of(made, ids)))
            apart = [p.split != "train" for p in made]
            facts.write_table(
                pa.table(
                    {
                        "prompt_id": hashes,
                        "split": [parts.SPLITS.index(p.split) for p in made],
                        "same": hashes,
                        "ancestor": [p.ancestor if yes else None for p, yes in zip(made, apart, strict=True)],
                        "words": [words[i % DIFFERENT] if yes else None for i, yes in zip(numbers, apart, strict=True)],
                    },
                    schema=parts.FACTS,
                )
            )


def _cpu() -> float:
    """Processor seconds of this process and of those that it has waited for."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _memory() -> float:
    """Memory of this process and its children together, in MB; a page that several share counts once."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for pid in ("self", *children):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it has ended
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def _peak_so_far() -> float:
    """The peak of the resident memory of this process, in MB. What getrusage says counts a parent as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Look at the memory twice a second, which takes some milliseconds itself."""
    found, ended = [_memory()], threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            found.append(_memory())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--import", type=int, default=100_000, dest="imported")
    parser.add_argument("--draw", type=int, default=1_000_000)
    args = parser.parse_args()
    for measure, count in ((measure_import, args.imported), (measure_draw, args.draw)):
        if count:
            print(json.dumps({name: round(value, 2) for name, value in measure(count).items()}))
