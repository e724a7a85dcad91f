#!/usr/bin/env python
"""One training step of ε-DPO against TRL's DPO and against ε-DPO with whole logits: `python scripts/bench_train.py`.

The same random Llama (hidden 512, 4 layers, untied head) and the same batch of 2 pairs of 512 tokens for each; forward
and backward, no optimizer; float32 on the CPU. Arms:

    trl      TRL's DPOTrainer(loss_type="sigmoid"), whose fused head gives log-probabilities and a few statistics
    plain    ε-DPO with both models' logits of the response window whole (tests/plain_epsilon_dpo.py)
    lean     ε-DPO as selfplay.training.epsilon_dpo does it

Each repeat of each arm is a process of its own, the arms interleaved; a tiny batch goes first, so that libraries are
warm. Wall and CPU seconds of the one step; memory: the peak resident set during the step less that before it. The split
into prompt and response is the same for all: by default 128 + 384 tokens, and 16 + 496, the worst case for whoever leaves
prompt positions out. One line a figure, then the ratios and their targets.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ARMS = ("trl", "plain", "lean")
FIGURES = {"wall": "s", "cpu": "s", "growth": "MB"}
PAIRS, HIDDEN, LAYERS = 2, 512, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32768, 131072], metavar="WORDS")
    parser.add_argument("--split", nargs="+", default=["128+384", "16+496"], metavar="PROMPT+RESPONSE", help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    splits = [tuple(int(tokens) for tokens in split.split("+")) for split in args.split]
    if args.arm:
        (prompt, response), (vocabulary,) = splits[0], args.vocabulary
        print(json.dumps(measure(args.arm, vocabulary, prompt, response, args.threads)))
        return
    for vocabulary in args.vocabulary:
        for prompt, response in splits:
            bench(vocabulary, prompt, response, args.repeats, args.threads)


def bench(vocabulary: int, prompt: int, response: int, repeats: int, threads: int) -> None:
    """Measure the arms, interleaved, and print their figures and ratios."""
    case = f"vocabulary {vocabulary}, prompt {prompt} + response {response}"
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        for arm in ARMS[repeat % 3 :] + ARMS[: repeat % 3]:
            argv = [sys.executable, __file__, "--arm", arm, "--vocabulary", str(vocabulary)]
            argv += ["--split", f"{prompt}+{response}", "--threads", str(threads)]
            child = subprocess.run(argv, capture_output=True, text=True)
            if child.returncode:
                sys.exit(f"{arm} failed:\n{child.stderr[-3000:]}")
            found[arm].append(json.loads(child.stdout.splitlines()[-1]))
            print(f"  {case}: {arm} {found[arm][-1]}", file=sys.stderr, flush=True)
    median = {
        arm: {name: statistics.median(one[name] for one in runs) for name in FIGURES} for arm, runs in found.items()
    }
    for arm, runs in found.items():
        for name, unit in FIGURES.items():
            values = [one[name] for one in runs]
            print(f"{case}: {arm} {name} median {median[arm][name]:.2f} {unit} "
                  f"(min {min(values):.2f}, max {max(values):.2f}, n {repeats})")  # fmt: skip
    lean = median["lean"]
    for name in ("wall", "cpu"):
        fastest = min(ARMS[:2], key=lambda arm: median[arm][name])
        ratio(f"{case}: {name}, lean / {fastest} (the faster)", lean[name] / median[fastest][name], 1.05)
    ratio(f"{case}: growth, lean / trl", lean["growth"] / median["trl"]["growth"], 1.0)
    ratio(
        f"{case}: growth, lean / plain", lean["growth"] / median["plain"]["growth"], 0.35 if vocabulary > 1e5 else None
    )


def ratio(what: str, value: float, target: float | None) -> None:
    verdict = "" if target is None else f" (target {target:g}: {'met' if value <= target else 'MISSED'})"
    print(f"{what} {value:.2f}{verdict}", flush=True)


def measure(arm: str, vocabulary: int, prompt: int, response: int, threads: int) -> dict[str, float]:
    """Seconds and memory growth (MB) of one step in this process."""
    import torch

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arm, vocabulary, prompt, response, folder)
        trainer.model.train()
        inputs = next(iter(trainer.get_train_dataloader()))
        few = {name: tensor[::PAIRS, -20:].contiguous() for name, tensor in inputs.items()}  # one pair's last tokens
        trainer.compute_loss(trainer.model, few).backward()
        trainer.model.zero_grad(set_to_none=True)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.compute_loss(trainer.model, inputs).backward()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall, "cpu": cpu, "growth": resident("VmHWM") - before}


def resident(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def build(arm: str, vocabulary: int, prompt: int, response: int, folder: str) -> Any:
    """The trainer of an arm, with a batch of data."""
    import torch
    from datasets import Dataset
    from plain_epsilon_dpo import PlainEpsilonDPOTrainer  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    from selfplay.training.epsilon_dpo import EpsilonDPOConfig, EpsilonDPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    settings = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(settings), LlamaForCausalLM(settings)
    reference.load_state_dict(policy.state_dict())
    reference.lm_head.weight.data += 0.01 * torch.randn_like(reference.lm_head.weight)
    words = [torch.randint(3, vocabulary, (n,)).tolist() for n in (prompt, response, response) for _ in range(PAIRS)]
    columns = {
        name: words[i * PAIRS : (i + 1) * PAIRS] for i, name in enumerate(("prompt_ids", "chosen_ids", "rejected_ids"))
    }
    data = Dataset.from_dict(columns)
    tokens = {"<pad>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<pad>")), pad_token="<pad>", eos_token="</s>"
    )
    kind, config = {
        "trl": (Tokenised, DPOConfig), "plain": (PlainEpsilonDPOTrainer, EpsilonDPOConfig),
        "lean": (EpsilonDPOTrainer, EpsilonDPOConfig),
    }[arm]  # fmt: skip
    args = config(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, report_to="none",
        per_device_train_batch_size=PAIRS, beta=0.1,
    )  # fmt: skip
    return kind(policy, reference, args=args, train_dataset=data, processing_class=tokenizer)


if __name__ == "__main__":
    main()
