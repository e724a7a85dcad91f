#!/usr/bin/env python
"""What the reward server costs: `python scripts/bench_reward.py [--model FOLDER]`.

The same conversations, of 4 to 100 words, three ways:

    bare     transformers alone, in this process: chat template, tokens, length-sorted batches under the server's token
             budget within each request's items, forward; no server, no client
    server   `python -m reward.server` as a process of its own, asked by RewardClient with two requests in flight
    single   the same server, one conversation a request, one request at a time (over a part of the conversations)

Repeats are interleaved, after one that does not count. For each way the median and the range of scores a second, and of
scores a second of processor time (of the server and of the client); then the medians of the ratios within each repeat, and
the largest difference between a score of `bare` and the server's. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from reward.client import RewardClient  # noqa: E402

Conversation = tuple[list[dict[str, str]], str]
WORDS = "the a of to and in is it that for red green blue house river city answer because when they also never often".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/tiny/current/reward")
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--words", type=int, nargs=2, default=(4, 100), help="shortest and longest response")
    parser.add_argument("--request", type=int, default=128, help="items in a request (default: 128)")
    parser.add_argument("--single", type=int, default=128, help="conversations that `single` asks for (default: 128)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    items = conversations(args.items, *args.words)

    bare = bare_loop(args.model, args.device, args.request)
    rates: dict[str, list[tuple[float, float]]] = {"bare": [], "server": [], "single": []}
    scores: dict[str, list[Any]] = {}
    with (
        server(args.model, args.device) as (url, pid),
        RewardClient(url, batch_size=args.request, concurrency=2) as many,
        RewardClient(url, batch_size=1, concurrency=1) as one,
    ):

        def own_and_server() -> float:
            return time.process_time() + cpu_seconds(pid)

        some = items[:: max(1, len(items) // args.single)]
        ways: dict[str, tuple[Callable[[], list[Any]], Callable[[], float]]] = {
            "bare": (lambda: bare(items), time.process_time),
            "server": (lambda: many.score(items), own_and_server),
            "single": (lambda: one.score(some), own_and_server),
        }
        for repeat in range(args.repeats + 1):
            for name, (score, cpu) in ways.items():
                wall_before, cpu_before = time.perf_counter(), cpu()
                scores[name] = score()
                wall, used = time.perf_counter() - wall_before, cpu() - cpu_before
                if repeat:
                    # the kernel counts a process' time in hundredths of a second
                    rates[name].append((len(scores[name]) / wall, len(scores[name]) / max(used, 0.01)))

    for name, found in rates.items():
        print(f"{name:7s} " + "   ".join(spread([f[i] for f in found], unit) for i, unit in ((0, "/s"), (1, "/CPU s"))))
    for top, bottom in (("server", "bare"), ("server", "single")):
        ratios = [
            statistics.median(a[i] / b[i] for a, b in zip(rates[top], rates[bottom], strict=True)) for i in (0, 1)
        ]
        print(f"{top} : {bottom} = {ratios[0]:.2f} (wall), {ratios[1]:.2f} (processor)")
    print(f"largest difference {max(abs(a - b) for a, b in zip(scores['bare'], scores['server'], strict=True)):.1e}")


def conversations(count: int, shortest: int, longest: int) -> list[Conversation]:
    found = []
    for i in range(count):
        words = shortest + i * 7919 % (longest - shortest + 1)
        response = " ".join(WORDS[(i * 31 + w * 7 + w * w // 5) % len(WORDS)] for w in range(words))
        found.append(([{"role": "user", "content": f"Question {i}: which city is it?"}], response))
    return found


def bare_loop(folder: Path, device: str, request: int) -> Callable[[list[Conversation]], list[float]]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from reward.models import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, batches

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).to(device).eval()
    model.config.use_cache = False
    pad = model.config.pad_token_id
    budget = CPU_BATCH_TOKENS if device == "cpu" else GPU_BATCH_TOKENS

    def score(items: list[Conversation]) -> list[float]:
        found = [0.0] * len(items)
        for start in range(0, len(items), request):
            turns = [[*m, {"role": "assistant", "content": r}] for m, r in items[start : start + request]]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            for batch in batches({i: len(x) for i, x in enumerate(ids)}, budget):
                width = max(len(ids[i]) for i in batch)
                padded = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch], device=device)
                mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch], device=device)
                with torch.inference_mode():
                    values = model(input_ids=padded, attention_mask=mask).logits[:, 0].float().tolist()
                for i, value in zip(batch, values, strict=True):
                    found[start + i] = value
        return found

    return score


@contextmanager
def server(folder: Path, device: str) -> Iterator[tuple[str, int]]:
    argv = [sys.executable, "-m", "reward.server", "--model", str(folder), "--device", device, "--port", "0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the server did not start: {' '.join(argv)}")
            yield json.loads(line)["url"], process.pid
        finally:
            process.kill()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float], unit: str) -> str:
    return f"{statistics.median(values):8.1f} {unit} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
