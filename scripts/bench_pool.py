#!/usr/bin/env python
"""What a pool of engines gives: `python scripts/bench_pool.py [--config configs/tiny.yaml --repeats 5]`.

    two engines ÷ one     tokens a second of the stage `generate` with two engines, each with a core of its own, against one
                          of the two, on the world of the configuration (goal: 1.6)
    stage ÷ raw vLLM      the same for one engine against vLLM itself, which gets all prompts at once, at answers of very
                          different lengths: a model with random weights of the same shape, which ends an answer with a
                          chance of 1 in 64 at each token, and after 256 at the latest (goal: 0.95)

Both sides of a comparison alternate, and both keep their processes. One line is printed for each figure: the median of the
ratios, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

LONGEST, MEAN = 256, 64  # tokens of an answer with random weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--prompts", type=int, default=384)
    parser.add_argument("--shard-prompts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["two", "raw"])
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        raw(json.loads(args.job.read_text()))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "raw":
            two_engines(args, Path(folder) / "two")
        if args.only != "two":
            against_raw(args, Path(folder) / "raw")


def two_engines(args: argparse.Namespace, run_dir: Path) -> None:
    from selfplay.generation.generator import Generator

    config = configured(args, run_dir, "generate.engines=2")
    policy, asked = prepare(config, run_dir, Path(config.policy.model), args.prompts)
    both = Generator(config, run_dir, run_dir / "engine.log", on_event=print)
    alone = Generator(config, run_dir, run_dir / "engine.log", on_event=print)
    try:
        both.start()
        both.load(policy)
        alone.engines = both.engines[:1]
        alone.policy, alone.verified = both.policy, both.verified
        sides = {
            "two": lambda: stage(both, config, asked, run_dir),
            "one": lambda: stage(alone, config, asked, run_dir),
        }
        compare("two engines ÷ one", sides, args.repeats, 1.6)
    finally:
        both.stop()


def against_raw(args: argparse.Namespace, run_dir: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from selfplay.generation.generator import Generator
    from selfplay.storage import tables
    from selfplay.types import Prompt

    config = configured(args, run_dir, f"generate.max_tokens={LONGEST}", "train.max_length=1024")
    source = run_dir / "source"
    shape = AutoConfig.from_pretrained(config.policy.model, max_position_embeddings=1024)
    AutoModelForCausalLM.from_config(shape).save_pretrained(source)
    AutoTokenizer.from_pretrained(config.policy.model).save_pretrained(source)
    stops = list(range(0, shape.vocab_size, MEAN))
    config = configured(
        args, run_dir, f"generate.max_tokens={LONGEST}", "train.max_length=1024", f"generate.stop_token_ids={stops}"
    )
    policy, asked = prepare(config, run_dir, source, args.prompts // 2)
    generator = Generator(config, run_dir, run_dir / "engine.log", on_event=print)
    rows = tables.read_rows(asked, Prompt)
    job = {
        "model": str(source),
        "prompts": [row.prompt_ids for row in rows],
        "seeds": [seed(row.prompt_id) for row in rows],
        "stops": stops,
        "n": config.generate.candidates,
        "context": config.prompts.max_tokens + LONGEST + 1,
        "max_num_seqs": config.generate.engine.max_num_seqs,
    }
    (run_dir / "job.json").write_text(json.dumps(job))
    child = subprocess.Popen(
        [sys.executable, __file__, "--job", str(run_dir / "job.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None

    def ask_raw() -> float:
        print("go", file=child.stdin, flush=True)
        for line in child.stdout or ():
            if line.startswith("rate "):
                return float(line.split()[1])
        raise RuntimeError("vLLM ended")

    try:
        generator.load(policy)
        sides = {"stage": lambda: stage(generator, config, asked, run_dir), "raw": ask_raw}
        compare("stage ÷ raw vLLM", sides, args.repeats, 0.95)
    finally:
        generator.stop()
        child.kill()


def compare(what: str, sides: dict[str, Callable[[], float]], repeats: int, goal: float) -> None:
    """Print the ratio of the two sides' tokens a second."""
    (first, one), (second, other) = sides.items()
    one(), other()  # what is made at the first time does not count
    rates: dict[str, list[float]] = {first: [], second: []}
    for i in range(repeats):
        for name in (first, second) if i % 2 else (second, first):
            rates[name].append(sides[name]())
    ratios = [a / b for a, b in zip(rates[first], rates[second], strict=True)]
    means = ", ".join(f"{name} {statistics.median(rate):,.0f} tokens/s" for name, rate in rates.items())
    print(
        f"{what}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; goal {goal}); {means}",
        flush=True,
    )


def stage(generator: Any, config: Any, asked: Path, run_dir: Path) -> float:
    """Tokens a second of the stage."""
    from selfplay.generation import sampling

    class Quiet:
        def update(self, **fields: object) -> None: ...

    with tempfile.TemporaryDirectory(dir=run_dir) as folder:
        began = time.monotonic()
        metrics = sampling.generate(
            Path(folder),
            Quiet(),  # type: ignore[arg-type]
            prompts=asked,
            generator=generator,
            settings=config.generate,
            seed=seed,
            shards=Path(folder) / "shards",
            breathe=lambda kind: None,
        )
        return metrics["tokens"] / (time.monotonic() - began)


def raw(job: dict[str, Any]) -> None:
    """vLLM by itself: answers all prompts at each line on stdin, and prints tokens a second."""
    from selfplay.generation.engine import CPU_BATCHED_TOKENS, CPU_BLOCK, cpu_build, prepare

    prepare(cpu_build(), 1)
    import vllm

    on_cpu = {
        "enforce_eager": True, "block_size": CPU_BLOCK, "enable_chunked_prefill": False,
        "max_num_batched_tokens": CPU_BATCHED_TOKENS, "kv_cache_memory_bytes": 2**30,
    } if cpu_build() else {}  # fmt: skip
    llm = vllm.LLM(
        model=job["model"], dtype="float32", max_model_len=job["context"], max_num_seqs=job["max_num_seqs"],
        logprobs_mode="raw_logprobs", generation_config="vllm", **on_cpu,
    )  # fmt: skip
    for _ in sys.stdin:
        params = [
            vllm.SamplingParams(
                n=job["n"], temperature=1.0, max_tokens=LONGEST, stop_token_ids=job["stops"], seed=s % 2**62, logprobs=0
            )
            for s in job["seeds"]
        ]
        began = time.monotonic()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False)
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        print(f"rate {tokens / (time.monotonic() - began)}", flush=True)


def configured(args: argparse.Namespace, run_dir: Path, *more: str) -> Any:
    from selfplay.config import load

    run = [f"run.dir={run_dir.parent}", f"run.name={run_dir.name}", f"generate.shard_prompts={args.shard_prompts}"]
    return load(args.config, [*run, *more, *args.set])


def prepare(config: Any, run_dir: Path, source: Path, count: int) -> tuple[Any, Path]:
    """The initial policy of a run folder, with its canaries, and a file of so many of the world's prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selfplay.storage import tables
    from selfplay.storage.policies import Policies
    from selfplay.types import Prompt

    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    lines = Path(config.prompts.source).read_text().splitlines()[:count]
    rows = []
    for i, line in enumerate(lines):
        given = json.loads(line)
        messages = given.get("messages") or [{"role": "user", "content": given["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rows.append(Prompt(prompt_id=f"{i:016x}", messages=messages, prompt_ids=ids, split="train"))
    run_dir.mkdir(parents=True, exist_ok=True)
    tables.write_rows(run_dir / "asked.parquet", rows, Prompt)
    canaries = [row.prompt_ids for row in rows[:8]]
    logps = []
    with torch.no_grad():
        for ids in canaries:
            steps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            logps.append(float(steps[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum()))
    policies = Policies(run_dir)
    policies.import_initial(source, {"token_ids": canaries, "logps": logps}, "", {})
    return policies.get(0), run_dir / "asked.parquet"


def seed(prompt_id: str) -> int:
    from selfplay.seeds import derive

    return derive("bench", prompt_id)


if __name__ == "__main__":
    main()
