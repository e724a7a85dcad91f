"""The generator's engine with one order more: what vLLM alone needs for all prompts at once (`python -m gpu_kit.alone`).

    alone  {job: a file of prompts, seeds and settings}  → {seconds, lengths: tokens of each answer}

Both sides of the comparison then have the same engine, warm, with the same settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from selfplay.generation import engine, orders
from selfplay.processes.protocol import Channel, Event
from selfplay.storage import folders


def take_orders(channel: Channel, known: Mapping[str, Any], **more: Any) -> None:
    """As that of the engine, with the order `alone`."""
    whole = known["generate"].__self__  # the Engine whose method this is
    orders.take_orders(channel, {**known, "alone": partial(alone, whole)}, **more)


def alone(whole: Any, order: Event) -> dict[str, Any]:
    from vllm import SamplingParams

    job: dict[str, Any] = folders.read_json(Path(order["job"]))
    params = [
        SamplingParams(
            n=job["candidates"], temperature=1.0, max_tokens=job["max_tokens"], stop_token_ids=job["stop_token_ids"],
            logprobs=0, seed=seed % engine.SEEDS,
        )
        for seed in job["seeds"]
    ]  # fmt: skip
    asked = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    began = time.monotonic()
    outputs = whole._llm.generate(asked, params, use_tqdm=False)
    seconds = time.monotonic() - began
    return {"seconds": seconds, "lengths": [len(answer.token_ids) for out in outputs for answer in out.outputs]}


if __name__ == "__main__":
    engine.take_orders = take_orders
    engine.main()
