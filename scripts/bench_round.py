#!/usr/bin/env python
"""A warm round against the same work as three fresh processes, interleaved: `python scripts/bench_round.py`.

Ours: generate, score, pairs, train and swap of a running controller; evaluation left out. The chain: one process that
samples with vLLM, one that scores with transformers, one that trains with TRL's DPOTrainer, each started anew, with the
same engine arguments, prompts, number of candidates, of pairs and of optimizer steps. «tuned»: the chain with vLLM in one
process and one OpenMP thread a process. Wall seconds; CPU seconds of all processes beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS = [
    "evaluate.gate.win_rate_lower=0",  # every candidate is promoted, so that every round swaps
    "evaluate.gate.reward_up=false",
    "evaluate.gate.max_length_ratio=99",
    "evaluate.gate.max_cut_off=1",
    "evaluate.gate.max_kl=1000000",
    "evaluate.prompts=8",
    "evaluate.audit_every=0",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stage", choices=["generate", "score", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        job = json.loads(args.job.read_text())
        {"generate": chain_generate, "score": chain_score, "train": chain_train}[args.stage](job)
        return
    bench(args.config, [*args.set, *SETTINGS], args.repeats)


def bench(config_path: str, overrides: list[str], repeats: int) -> None:
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    found: dict[str, list[tuple[float, float]]] = {"ours": [], "chain": [], "tuned": []}
    with tempfile.TemporaryDirectory() as folder:
        config = load(config_path, overrides)
        run_dir = Path(folder) / "run"
        display = Display()
        with Run(config, run_dir, display) as run:
            run_round(run)  # the engine's start and the first round are not warm
            for repeat in range(repeats):
                for name in list(found)[repeat % 3 :] + list(found)[: repeat % 3]:
                    wall, cpu = time.monotonic(), cpu_seconds(run_dir)
                    if name == "ours":
                        report = run_round(run)
                        left_out = report.seconds["evaluate"]
                        print("   ours by stage: " + " ".join(f"{k} {v:.1f}" for k, v in report.seconds.items()))
                    else:
                        chain(run_dir, Path(folder), tuned=name == "tuned")
                        left_out = 0.0
                    seconds = time.monotonic() - wall - left_out
                    found[name].append((seconds, cpu_seconds(run_dir) - cpu))
                    print(f"{name:6s} {seconds:7.1f} s wall {found[name][-1][1]:7.1f} s CPU", flush=True)
    for name, values in found.items():
        walls = [w for w, _ in values]
        print(
            f"{name}: median {statistics.median(walls):.1f} s (min {min(walls):.1f}, max {max(walls):.1f}), "
            f"CPU median {statistics.median(c for _, c in values):.1f} s"
        )
    ours = statistics.median(w for w, _ in found["ours"])
    for name in ("chain", "tuned"):
        print(f"ours / {name}: {ours / statistics.median(w for w, _ in found[name]):.2f}")


def cpu_seconds(run_dir: Path) -> float:
    """User and system seconds of this process, its ended children and the living ones of the run."""
    from selfplay.processes.reaping import marked

    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = ended.ru_utime + ended.ru_stime + own.ru_utime + own.ru_stime
    for pid in marked(run_dir):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def chain(run_dir: Path, folder: Path, tuned: bool) -> None:
    """The same work as the last finished round, in three processes one after another."""
    from selfplay.storage.policies import Policies

    rounds = sorted((run_dir / "rounds").iterdir())
    policies = Policies(run_dir)
    current = policies.current
    assert current is not None, "a run has a current policy"
    job: dict[str, Any] = {
        "round": str(rounds[-1]),
        "policy": str(policies.folder(current).resolve()),
        "folder": str(folder),
        "config": None,
    }
    from selfplay.storage.ledger import Store

    store = Store(run_dir)
    job["config"] = store.config(store.rounds()[-1]["round"])
    job["pairs"] = int(store.metrics(store.rounds()[-1]["round"])["depth/pairs"])
    store.close()
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    if tuned:
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
    for stage in ("generate", "score", "train"):
        began = time.monotonic()
        log = folder / f"{stage}.log"
        with log.open("wb") as out:
            argv = [sys.executable, __file__, "--stage", stage, "--job", str(path)]
            code = subprocess.run(argv, env=environment, stdout=out, stderr=out).returncode
        if code:
            sys.exit(f"{stage} of the chain failed:\n{log.read_text()[-2000:]}")
        print(f"   chain {stage} {time.monotonic() - began:.1f} s")


def chain_generate(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    from selfplay.storage import tables
    from selfplay.types import Prompt

    config = job["config"]
    prompts = tables.read_rows(Path(job["round"]) / "prompts" / "prompts.parquet", Prompt)
    g = config["generate"]
    length = config["prompts"]["max_tokens"] + g["max_tokens"] + 1
    llm = LLM(
        model=job["policy"], dtype=config["policy"]["dtype"], max_model_len=max(length, 136), max_num_seqs=g["engine"]["max_num_seqs"],
        enforce_eager=True, block_size=32, enable_chunked_prefill=False, max_num_batched_tokens=4096,
        generation_config="vllm", logprobs_mode="raw_logprobs",
    )  # fmt: skip
    eos = llm.get_tokenizer().eos_token_id
    params = [
        SamplingParams(
            n=g["candidates"],
            temperature=g["temperature"],
            max_tokens=g["max_tokens"],
            stop_token_ids=[eos],
            seed=i * 1000,
            logprobs=0,
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": p.prompt_ids} for p in prompts], params, use_tqdm=False)
    rows = [
        {
            "messages": p.messages,
            "prompt_ids": p.prompt_ids,
            "ids": list(c.token_ids),
            "text": c.text,
            "reason": c.finish_reason,
            "prompt": i,
        }
        for i, (p, o) in enumerate(zip(prompts, outputs, strict=True))
        for c in o.outputs
    ]
    (Path(job["folder"]) / "candidates.json").write_text(json.dumps(rows))


def chain_score(job: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(
        job["config"]["reward"]["model"], dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["config"]["reward"]["model"])
    rows = json.loads((Path(job["folder"]) / "candidates.json").read_text())
    ids = [
        tokenizer.apply_chat_template(
            [*r["messages"], {"role": "assistant", "content": r["text"]}], tokenize=True, return_dict=False
        )
        for r in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in part]}, padding_side="right", return_tensors="pt")
            for i, reward in zip(part, model(**batch).logits[:, 0].tolist(), strict=True):
                rows[i]["reward"] = reward
    (Path(job["folder"]) / "scored.json").write_text(json.dumps(rows))


def chain_train(job: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Tokenized(DPOTrainer):
        """TRL's own trainer on data that is tokenised already, as ours is."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    train = job["config"]["train"]
    by_prompt: dict[int, list[dict[str, Any]]] = {}
    for row in json.loads((Path(job["folder"]) / "scored.json").read_text()):
        if row["reason"] == "stop":
            by_prompt.setdefault(row["prompt"], []).append(row)
    pairs = []
    for rows in by_prompt.values():
        best, worst = max(rows, key=lambda r: r["reward"]), min(rows, key=lambda r: r["reward"])
        pairs.append((best["reward"] - worst["reward"], best, worst))
    pairs.sort(key=lambda p: -p[0])
    data = Dataset.from_list(
        [
            {"prompt_ids": b["prompt_ids"], "chosen_ids": b["ids"], "rejected_ids": w["ids"]}
            for _, b, w in pairs[: job["pairs"]]
        ]
    )
    args = DPOConfig(
        output_dir=str(Path(job["folder"]) / "dpo"), beta=train["beta"], learning_rate=train["learning_rate"],
        num_train_epochs=train["epochs"], per_device_train_batch_size=train["micro_batch_pairs"],
        gradient_accumulation_steps=train["batch_pairs"] // train["micro_batch_pairs"], lr_scheduler_type=train["schedule"],
        bf16=False, gradient_checkpointing=False, max_length=None, report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(),
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["policy"], dtype=torch.float32)
    trainer = Tokenized(
        model, args=args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(job["policy"])
    )
    trainer.train()
    trainer.save_model(str(Path(job["folder"]) / "dpo" / "final"))


if __name__ == "__main__":
    main()
