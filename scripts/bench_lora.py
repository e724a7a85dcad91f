#!/usr/bin/env python
"""A training of SmolLM2 with an adapter by ε-DPO against TRL's DPO on the same pairs: `python scripts/bench_lora.py`.

Both train the same adapter on the same pairs, in the same micro-batches, precision and number of threads, without gradient
checkpointing: TRL's DPOTrainer(loss_type="sigmoid") as shipped, and the job that a round gives to our trainer, its agreement
check included. The clock runs from the beginning of the training to its end, loading and export apart. Each repeat of each
arm is a process of its own, in turns. Figures: seconds and CPU seconds of an optimizer step, all of the training divided by
its steps, and by how much the resident set grew at its peak.

The pairs are prompts of `scripts/get_smollm2.py` with pieces of its texts as answers, as long as sampled answers are, or
those of a round (`--pairs rounds/0001/depth/pairs.parquet`).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "scripts")]

from bench_train import FIGURES, ratio, resident  # noqa: E402

ARMS = ("trl", "ours")
GOAL = 0.8
LONGEST, MICRO_BATCH, EPOCHS = 320, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "smollm2", help="what get_smollm2.py has made")
    parser.add_argument("--pairs", type=Path, help="a round's file of pairs (default: made of the model's prompts)")
    parser.add_argument("--count", type=int, default=32, help="how many pairs are trained on")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(args.repeats):
        for arm in ARMS if repeat % 2 else ARMS[::-1]:
            argv = [sys.executable, __file__, "--arm", arm, *sys.argv[1:]]
            env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
            child = subprocess.run(argv, capture_output=True, text=True, env=env)
            if child.returncode:
                sys.exit(f"{arm} failed:\n{child.stderr[-3000:]}")
            found[arm].append(json.loads(child.stdout.splitlines()[-1]))
            print(f"  {arm} {found[arm][-1]}", flush=True)
    for name, unit in FIGURES.items():
        middle = {arm: statistics.median(run[name] for run in runs) for arm, runs in found.items()}
        print(f"{args.precision} {name}: " + ", ".join(f"{arm} {value:.2f} {unit}" for arm, value in middle.items()))
        ratio(f"{args.precision} {name}, ours / trl", middle["ours"] / middle["trl"], GOAL)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and growth (MB), of one training in this process."""
    import pyarrow as pa
    import torch
    from transformers import TrainerCallback
    from transformers.utils import logging

    from selfplay.storage import tables

    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    began: dict[str, float] = {}

    class Clock(TrainerCallback):
        """Starts before our agreement check, since callbacks are called in their order."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            began.update(resident=resident("VmRSS"), wall=time.perf_counter(), cpu=time.process_time())

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            began.update(
                wall=(time.perf_counter() - began["wall"]) / state.max_steps,
                cpu=(time.process_time() - began["cpu"]) / state.max_steps,
                growth=resident("VmHWM") - began["resident"],
            )

    with tempfile.TemporaryDirectory() as folder:
        rows = pairs_of(args)
        file = Path(folder) / "pairs.parquet"
        tables.write_table(file, pa.Table.from_pylist(rows))
        trainer = (trl if args.arm == "trl" else ours)(args, file, Path(folder))
        trainer.callback_handler.callbacks.insert(0, Clock())
        trainer.train()
    return {name: began[name] for name in FIGURES}


def trl(args: argparse.Namespace, file: Path, folder: Path) -> Any:
    """TRL's trainer on token ids, which it takes as they are."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from selfplay.training.data import COLUMNS
    from selfplay.training.train_job import lora_config

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    job = the_job(args, file, folder)
    config = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=job.bf16, gradient_checkpointing=False, max_length=None,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, beta=job.beta, num_train_epochs=EPOCHS,
        learning_rate=job.learning_rate, per_device_train_batch_size=MICRO_BATCH,
    )  # fmt: skip
    return Tokenised(
        AutoModelForCausalLM.from_pretrained(job.policy, dtype="float32"), args=config,
        train_dataset=Dataset.from_parquet(str(file)).select_columns(list(COLUMNS)),
        processing_class=AutoTokenizer.from_pretrained(job.policy), peft_config=lora_config(job.lora),
    )  # fmt: skip


def ours(args: argparse.Namespace, file: Path, folder: Path) -> Any:
    """The trainer of a round's job, with its agreement check."""
    from selfplay.models.kept import Kept
    from selfplay.training import train_job

    job, report = the_job(args, file, folder), lambda *_: None
    trainer = train_job._build(job, report, Kept(keeps=False))
    trainer.add_callback(train_job._AgreementCheck(job, trainer, report))
    return trainer


def the_job(args: argparse.Namespace, file: Path, folder: Path) -> Any:
    from selfplay.config import load
    from selfplay.training.jobs import LoraJob, TrainJob

    model, train = args.model / "policy", load(ROOT / "configs" / "smollm2.yaml").train
    assert train.lora is not None, "the configuration trains an adapter"
    return TrainJob(
        pairs=file, policy=model, reference=model, initial=model, out=folder / "out", work=folder / "work", seed=0,
        beta=train.beta, epsilon=train.epsilon, learning_rate=train.learning_rate, epochs=EPOCHS, batch_pairs=MICRO_BATCH,
        micro_batch_pairs=MICRO_BATCH, max_length=LONGEST, bf16=args.precision == "bf16", save_steps=0,
        lora=LoraJob.model_validate(train.lora.model_dump()), agreement_mean=1e9,
        serving_dtype="bfloat16", canary_ids=[],
    )  # fmt: skip


def pairs_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs as token ids, with log-probabilities that nobody asks for."""
    from transformers import AutoTokenizer

    from selfplay.storage import tables

    names = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_logp", "rejected_logp")
    if args.pairs:
        rows: list[dict[str, Any]] = tables.read_whole(args.pairs, names).slice(0, args.count).to_pylist()
        return rows
    tokenizer = AutoTokenizer.from_pretrained(args.model / "policy")
    lines = (args.model / "prompts" / "train.jsonl").read_text().splitlines()[: args.count]
    asked = [json.loads(line)["prompt"] for line in lines]
    words = tokenizer(" ".join(asked))["input_ids"]
    rng, found = random.Random(0), []
    for text in asked:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        # Of answers to such prompts half were shorter than 40 tokens, and their mean was 57.
        answers = []
        for _ in range(2):
            begin, tokens = rng.randrange(len(words)), min(160, max(5, round(rng.lognormvariate(3.7, 0.85))))
            answers.append([*(words * 2)[begin : begin + tokens - 1], tokenizer.eos_token_id])
        found.append(dict(zip(names, (ids, *answers, 0.0, 0.0), strict=True)))
    return found


if __name__ == "__main__":
    main()
