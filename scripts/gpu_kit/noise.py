"""How far the same weights lie apart in two programs: the noise that the bounds of a swap have to allow.

The engine samples answers. Every token of them is scored in the engine's prefill, in the trainer's model in bfloat16 (which
makes the canaries), in its mixed precision (which trains) and in float32. A table has a row for each two of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_kit import checkpoints
from gpu_kit.part import Findings
from gpu_kit.sizes import Sizes
from selfplay.generation.installing import WarmEngine
from selfplay.models import weights

BOUNDS = (0.01, 0.02)  # nats a token: what a swap may ask of a mean over a window
Logps = list[NDArray[np.float64]]  # nats (T,) of each answer's tokens
Answers = list[tuple[list[int], int]]  # token ids of prompt and answer, and where the answer starts


def measure(sizes: Sizes, checkpoint: Path, engine: WarmEngine, findings: Findings) -> None:
    """One line for each two programs; `engine` is awake and has the weights of `checkpoint` in it."""
    scored: dict[str, Logps] = {"decode": []}
    answers: Answers = []
    for seed, prompt in enumerate(checkpoints.sequences(sizes, sizes.noise_answers, sizes.prompt_tokens, seed=1)):
        said = engine.order("canary_generate", prompt_ids=prompt, seed=seed, n=sizes.noise_tokens)
        answers.append((prompt + said["token_ids"], len(prompt)))
        scored["decode"].append(np.array(said["logps"]))
    scored["prefill"] = prefill(engine, answers)
    compare(findings, sizes, scored, "decode", "prefill")
    for name, dtype, mixed in (
        ("trainer in bf16", torch.bfloat16, False),
        ("trainer in float32", torch.float32, False),
        ("trainer in mixed precision", torch.float32, True),
    ):
        model = weights.load(checkpoint, dtype).to(checkpoints.device()).eval()
        with torch.autocast(checkpoints.device(), torch.bfloat16, enabled=mixed):
            scored[name] = [token_logps(model, ids, start) for ids, start in answers]
        del model
        checkpoints.release()
    compare(findings, sizes, scored, "prefill", "trainer in bf16")
    compare(findings, sizes, scored, "decode", "trainer in bf16")
    compare(findings, sizes, scored, "decode", "trainer in mixed precision")
    compare(findings, sizes, scored, "trainer in bf16", "trainer in float32")


def prefill(engine: WarmEngine, answers: Answers) -> Logps:
    """Each token as the last one of a prompt of its own: the engine tells sums, and no cache is read."""
    ends = [(ids[: t + 1], t) for ids, start in answers for t in range(start, len(ids))]
    flat = np.array(engine.logps(ends))
    return np.split(flat, np.cumsum([len(ids) - start for ids, start in answers])[:-1])


@torch.no_grad()
def token_logps(model: Any, ids: list[int], start: int) -> NDArray[np.float64]:
    tokens = torch.tensor([ids], device=model.device)
    logps = model(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
    found: NDArray[np.float64] = logps.gather(1, tokens[0, start:, None])[:, 0].double().cpu().numpy()
    return found


def compare(findings: Findings, sizes: Sizes, scored: dict[str, Logps], one: str, other: str) -> None:
    """Tell how far two programs lie apart, a token and over windows of some tokens (|mean of the signed differences|)."""
    apart = [a - b for a, b in zip(scored[one], scored[other], strict=True)]
    each, windows = np.abs(np.concatenate(apart)), over_windows(apart, sizes.window)
    p50, p95 = np.quantile(windows, [0.5, 0.95])
    findings.tell(
        f"noise: {one} ↔ {other}",
        tokens=each.size,
        mean_logp=float(np.concatenate(scored[one]).mean()),
        mean=float(each.mean()),
        p99=float(np.quantile(each, 0.99)),
        window=sizes.window,
        windows=windows.size,
        mean_of_window_p50=float(p50),
        mean_of_window_p95=float(p95),
        mean_of_window_max=float(windows.max()),
        **{f"share_of_windows_over_{bound}": float((windows > bound).mean()) for bound in BOUNDS},
    )


def over_windows(apart: Logps, size: int) -> NDArray[np.float64]:
    """|mean| of every whole window of `size` tokens of each answer."""
    return np.concatenate([np.abs(a[: a.size // size * size].reshape(-1, size).mean(1)) for a in apart])
