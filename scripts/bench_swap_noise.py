#!/usr/bin/env python
"""How far an engine in bfloat16 lies from the same weights in another program: `python scripts/bench_swap_noise.py`.

Models with random weights answer prompts in the engine. Its log-probabilities of windows of 8 and of 64 tokens of the answers
are compared with those of transformers in bfloat16, as means over the window (nats a token). Beside them stand the noise that
the engine shows on its canaries when it starts, and the bound that follows from it (`selfplay.generation.swap.tolerance`).
A row of a table is printed for each model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

TOKENS, PROMPT = 64, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["256x4", "512x8"], metavar="HIDDENxLAYERS")
    parser.add_argument("--answers", type=int, default=48)
    args = parser.parse_args()
    print(
        "| model | noise of the canaries | mean of 8: p95, most | over 0.02 | mean of 64: p95, most | bound | over it |"
    )
    print("|---|---|---|---|---|---|---|")
    for size in args.sizes:
        hidden, layers = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            row(Path(folder) / "run", hidden, layers, args.answers)


def row(run_dir: Path, hidden: int, layers: int, count: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from selfplay.config import Config
    from selfplay.generation.generator import Generator
    from selfplay.generation.swap import tolerance
    from selfplay.storage.policies import Policies

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=512,
        initializer_range=3 / hidden**0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model, source = LlamaForCausalLM(shape).to(torch.bfloat16).eval(), run_dir / "source"
    model.save_pretrained(source)
    _tokenizer(PreTrainedTokenizerFast, shape.vocab_size).save_pretrained(source)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, shape.vocab_size, (count, PROMPT)).tolist()
    canaries = [ids + rng.integers(3, shape.vocab_size, 64 - PROMPT).tolist() for ids in prompts[:8]]
    policies = Policies(run_dir)
    told = {"token_ids": canaries, "logps": [float(_logps(model, ids)[1:].sum()) for ids in canaries]}
    policies.import_initial(source, told, "", {})
    config = Config.model_validate(
        {
            "run": {"name": run_dir.name, "dir": str(run_dir.parent)},
            "policy": {"model": str(source), "dtype": "bfloat16"},
            "prompts": {"source": "none", "max_tokens": PROMPT},
            "generate": {"max_tokens": TOKENS, "engine": {"max_model_len": 256}},
            "swap": {"tolerance": 1.0},  # it is what is measured
            "reward": {"url": ["http://none"]},
        }
    )
    generator = Generator(config, run_dir, run_dir / "engine.log", on_event=print)
    try:
        generator.load(policies.get(0))
        warm = generator.engines[0].warm
        apart: dict[int, list[float]] = {8: [], TOKENS: []}
        for i, prompt in enumerate(prompts):
            said = warm.order("canary_generate", prompt_ids=prompt, seed=i, n=TOKENS)
            ids, reference = prompt + said["token_ids"], _logps(model, prompt + said["token_ids"])
            for width, found in apart.items():
                starts = range(PROMPT, PROMPT + TOKENS, width)
                sums = warm.logps([(ids[: start + width], start) for start in starts])
                found += [abs(s - reference[t : t + width].sum()) / width for s, t in zip(sums, starts, strict=True)]
        noise = warm.noise
    finally:
        generator.stop()
    bound = tolerance("bfloat16", noise, TOKENS)
    eight, many = np.array(apart[8]), np.array(apart[TOKENS])
    print(
        f"| {hidden} × {layers} | {noise:.3f} | {np.quantile(eight, 0.95):.3f}, {eight.max():.3f} | {(eight > 0.02).mean():.0%} "
        f"| {np.quantile(many, 0.95):.3f}, {many.max():.3f} | {bound:.3f} | {(many > bound).mean():.0%} |",
        flush=True,
    )


def _logps(model: Any, ids: list[int]) -> Any:
    """Nats (T,) of each token under transformers; that of the first one is 0."""
    import torch

    with torch.no_grad():
        steps = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    found = steps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].double().numpy()
    return np.concatenate([[0.0], found])


def _tokenizer(kind: Any, size: int) -> Any:
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(size)}
    return kind(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
        pad_token="t0",
        bos_token="t1",
        eos_token="t2",
    )


if __name__ == "__main__":
    main()
