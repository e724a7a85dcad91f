"""One worker process of a build: `python -m selfplay.worlds.tiny.builder.worker`, started by `build`."""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from selfplay.worlds.tiny.builder.examples import split, write_prompts
from selfplay.worlds.tiny.builder.llama import Llama, export
from selfplay.worlds.tiny.builder.measure import measure
from selfplay.worlds.tiny.builder.policy import train_policy
from selfplay.worlds.tiny.builder.recipe import JUDGES, Judge, Recipe
from selfplay.worlds.tiny.builder.reward import make_groups, train_reward
from selfplay.worlds.tiny.builder.tokenizer import END, PAD, reward_first


def work(recipe: Recipe, rank: int, out: Path, parent: int) -> None:
    """Do the share of worker `rank`. The first worker prints its progress as JSON lines, and writes the world to `out`."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a worker never outlives the process that started it
    if os.getppid() != parent:
        sys.exit("the process that started this worker ended before it began")
    torch.set_num_threads(1)
    last: dict[str, Any] = {"stage": "", "when": 0.0}

    def report(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        if rank == 0 and (done == total or stage != last["stage"] or now - last["when"] > 0.5):
            last.update(stage=stage, when=now)
            print(json.dumps({"stage": stage, "done": done, "total": total} | figures), flush=True)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=recipe.workers
    )
    train, held_out = split(recipe)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        result = call()
        seconds[name] = [round(time.monotonic() - wall, 1), round(time.process_time() - cpu, 1)]
        return result

    policy = timed("policy", lambda: train_policy(recipe, rank, out, train, report))

    def trained(part: Judge) -> tuple[Llama, torch.Tensor]:
        groups = timed(f"samples for {part}", lambda: make_groups(recipe, part, rank, out, policy, train, report))
        found: tuple[Llama, torch.Tensor] = timed(
            part, lambda: train_reward(recipe, part, rank, out, policy, groups, report)
        )
        return found

    judges = {part: trained(part) for part in JUDGES}
    if rank == 0:
        first = reward_first(recipe)
        write_prompts(out, train, held_out, recipe.seed)
        export(policy, None, out / "policy", END, PAD)
        for part, (model, head) in judges.items():
            export(model, head, out / part, first + END, first + PAD)
        sampling = {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "max_new_tokens": recipe.max_tokens,
        }
        (out / "policy" / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
        found = timed(
            "measure", lambda: measure(recipe, out, policy, judges, held_out[:: max(1, len(held_out) // 200)], 4)
        )
        found |= {
            "parameters": sum(p.numel() for p in policy.parameters()),
            "prompts": {"train": len(train), "heldout": len(held_out)},
            "seconds": {name: {"wall": wall, "cpu_of_one_worker": cpu} for name, (wall, cpu) in seconds.items()},
        }
        (out / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True, help="number of this worker, from 0 on")
    parser.add_argument("--recipe", required=True, help="the recipe as JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder that the workers write to")
    parser.add_argument(
        "--parent", type=int, required=True, help="process that started this one, and ends it with itself"
    )
    options = parser.parse_args()
    work(Recipe(**json.loads(options.recipe)), options.rank, options.out, options.parent)


if __name__ == "__main__":
    main()
