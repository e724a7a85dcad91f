#!/usr/bin/env python
"""Pairs a second of warm rounds against TRL's OnlineDPOTrainer as shipped: `python scripts/bench_peers.py`.

Both train a policy on pairs of K = 2 answers to its prompts, one epoch, the same learning rate, lengths, temperature, precision
and pairs in an optimizer step, on the same number of threads, with the adapter of the configuration where it has one. The
reward is the model of the configuration. Without one it is a rule that hardly ever gives two answers the same (`--config
configs/smollm2.yaml --prompts 64`): checks of instructions do so often, we drop such pairs, and the peer trains on them.
Steady state, interleaved:

    ours   a controller that runs. A round samples, scores, ranks, trains, exports, swaps, verifies and commits everything
           durably; the evaluation of the gate is left out, which the peer does not have. All of a round's seconds count.
    trl    one process. A step samples two answers by transformers' generation, scores, trains; nothing is saved. Only the
           seconds of its steps count.

A segment is a warm round of ours, or as many steps of the peer as have the pairs of a round. While one works the other waits.
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
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_round import SETTINGS, cpu_seconds  # noqa: E402

GOAL, GOAL_WITH_ADAPTER = 1.5, 2.5
SAME = {"generate.candidates": 2, "train.epochs": 1, "pairs.keep": 1.0, "pairs.cut_off": "reject"}
RULES = [{"rule": "length", "unit": "characters", "min": 1000}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--prompts", type=int, default=192, help="of a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="OpenMP threads of each process that computes"
    )
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(json.loads(args.peer.read_text()))
    else:
        bench(args)


def bench(args: argparse.Namespace) -> None:
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    same = [f"{key}={value}" for key, value in SAME.items()]
    given = load(args.config, args.set)
    if given.reward.model is None:
        same.append(f"reward.source={json.dumps({'kind': 'rules', 'rules': RULES})}")
    engines = given.generate.engine_count
    threads = [f"train.cpu_threads={args.threads}", f"generate.engine.cpu_threads={max(1, args.threads // engines)}"]
    config = load(args.config, [*same, *threads, f"prompts.per_round={args.prompts}", *args.set, *SETTINGS])
    found: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder, Run(config, Path(folder) / "run", Display()) as run:
        other = Peer(config, args.threads, args.prompts, Path(folder))
        run_round(run)  # the first round starts engine, reward and trainer
        run_round(run)
        other.segment()
        for repeat in range(args.repeats):
            for name in ("ours", "trl") if repeat % 2 else ("trl", "ours"):
                wall, cpu = time.monotonic(), cpu_seconds(run.dir)
                if name == "ours":
                    report = run_round(run)
                    pairs = int(report.metrics["depth/pairs"])
                    seconds = time.monotonic() - wall - report.seconds["evaluate"]
                    print("   ours by stage: " + " ".join(f"{k} {v:.2f}" for k, v in report.seconds.items()))
                    parts = {k: v for k, v in report.metrics.items() if k.startswith("train/seconds_")}
                    print("   trainer: " + " ".join(f"{k.rpartition('_')[2]} {v:.2f}" for k, v in parts.items()))
                else:
                    seconds, pairs = other.segment()
                found[name].append(pairs / seconds)
                spent = f", {cpu_seconds(run.dir) - cpu:.1f} s CPU" if name == "ours" else ""
                print(f"{name:5s} {pairs} pairs in {seconds:.2f} s{spent}: {found[name][-1]:.1f} pairs/s", flush=True)
        other.end()
    for name, values in found.items():
        print(f"{name}: median {statistics.median(values):.1f} pairs/s (min {min(values):.1f}, max {max(values):.1f})")
    ratio = statistics.median(found["ours"]) / statistics.median(found["trl"])
    goal = GOAL_WITH_ADAPTER if config.train.lora else GOAL
    print(f"ours / trl: {ratio:.2f} (goal {goal:g}: {'met' if ratio >= goal else 'MISSED'})")


class Peer:
    """The other process, which does a segment when it is told to."""

    def __init__(self, config: Any, threads: int, pairs: int, folder: Path) -> None:
        train, batch = config.train, config.train.batch_pairs
        job = {
            "policy": config.policy.model, "reward": config.reward.model, "prompts": config.prompts.source,
            "max_tokens": config.generate.max_tokens, "temperature": config.generate.temperature, "beta": train.beta,
            "learning_rate": train.learning_rate, "max_length": train.max_length, "batch": batch, "steps": -(-pairs // batch),
            "threads": threads, "folder": str(folder / "trl"), "bf16": train.bf16,
            "lora": train.lora and {"r": train.lora.r, "lora_alpha": train.lora.alpha},
        }  # fmt: skip
        path = folder / "peer.json"
        path.write_text(json.dumps(job))
        self._log = (folder / "peer.log").open("w+")
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        argv = [sys.executable, __file__, "--peer", str(path)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=env, text=True
        )

    def segment(self) -> tuple[float, int]:
        """Have it do its steps; the seconds that they took, and their pairs."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("segment "):
                seconds, pairs = line.split()[1:]
                return float(seconds), int(pairs)
        self._log.seek(0)
        sys.exit(f"the peer ended:\n{self._log.read()[-3000:]}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def peer(job: dict[str, Any]) -> None:
    """TRL's trainer. Before each segment it waits for a line on stdin; afterwards it tells its seconds and its pairs."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["policy"])
    tokenizer.padding_side = "left"
    rows = [json.loads(line) for line in Path(job["prompts"]).read_text().splitlines()]
    asked = [row.get("prompt") or row["messages"][-1]["content"] for row in rows]
    score = scores_of_model(job["reward"]) if job["reward"] else scores_of_rules(RULES)

    class Timed(OnlineDPOTrainer):
        taken = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.taken % job["steps"] == 0:
                if not sys.stdin.readline():
                    sys.exit()
                self.seconds = 0.0
            began = time.perf_counter()
            loss = super().training_step(*args, **kwargs)
            self.seconds += time.perf_counter() - began
            self.taken += 1
            if self.taken % job["steps"] == 0:
                print("segment", self.seconds, job["steps"] * job["batch"], flush=True)
            return loss

    args = OnlineDPOConfig(
        output_dir=job["folder"], use_cpu=True, bf16=job["bf16"], gradient_checkpointing=False, use_vllm=False,
        per_device_train_batch_size=job["batch"], max_new_tokens=job["max_tokens"], max_length=job["max_length"],
        beta=job["beta"], learning_rate=job["learning_rate"], temperature=job["temperature"], max_steps=1_000_000,
        report_to="none", save_strategy="no", logging_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    Timed(
        model=AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32), reward_funcs=score, args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in asked]),
        processing_class=tokenizer,
        peft_config=job["lora"] and LoraConfig(**job["lora"], target_modules="all-linear", task_type="CAUSAL_LM"),
    ).train()  # fmt: skip


Score = Callable[..., list[float]]


def scores_of_model(folder: str) -> Score:
    """Scores a reward model gives to prompts and completions."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()

    def score(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [
            tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in zip(prompts, completions, strict=True)
        ]
        batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores: list[float] = logits[:, 0].tolist()
        return scores

    return score


def scores_of_rules(rules: list[dict[str, Any]]) -> Score:
    """The sums that the rules of a configuration give to completions."""
    from reward.rules import Rules
    from reward.schema import Item
    from reward.settings import RulesSettings

    scorer = Rules(RulesSettings.model_validate({"rules": rules}).rules)

    def score(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return [
            scorer.value(Item(messages=messages, response=completion["content"]))
            for messages, (completion,) in zip(prompts, completions, strict=True)
        ]

    return score


if __name__ == "__main__":
    main()
