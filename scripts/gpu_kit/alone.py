"""vLLM alone answers all prompts at once: `python -m gpu_kit.alone JOB.json`; what it took goes to JOB.found.json."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from selfplay.generation.engine import CPU_BATCHED_TOKENS, CPU_BLOCK, SEEDS, cpu_build, prepare
from selfplay.storage import folders


def main() -> None:
    job_file = Path(sys.argv[1])
    job: dict[str, Any] = folders.read_json(job_file)
    cpu = cpu_build()
    prepare(cpu, threads=1, kv_cache_gib=1)  # as the generator's child has them
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {"gpu_memory_utilization": job["gpu_memory_utilization"]}
    if cpu:
        more = {
            "enforce_eager": True,
            "block_size": CPU_BLOCK,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": CPU_BATCHED_TOKENS,
        }
    llm = LLM(
        model=job["model"], dtype=job["dtype"], max_num_seqs=job["max_num_seqs"], max_model_len=job["max_model_len"],
        generation_config="vllm", logprobs_mode="raw_logprobs", **more,
    )  # fmt: skip
    params = [
        SamplingParams(
            n=job["candidates"], temperature=1.0, max_tokens=job["max_tokens"], stop_token_ids=job["stop_token_ids"],
            logprobs=0, seed=seed % SEEDS,
        )
        for seed in job["seeds"]
    ]  # fmt: skip
    asked: list[Any] = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    found = []
    for _ in range(job["passes"]):
        began = time.monotonic()
        outputs = llm.generate(asked, params, use_tqdm=False)
        seconds = time.monotonic() - began
        lengths = [len(answer.token_ids) for output in outputs for answer in output.outputs]
        found.append({"seconds": seconds, "lengths": lengths})
        folders.write_json(job_file.with_suffix(".found.json"), found)


if __name__ == "__main__":
    main()
