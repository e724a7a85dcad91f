"""Small random checkpoints, pairs, and jobs of the trainer that train on them."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from epsilon_dpo_world import WORDS, model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from selfplay.errors import TrainError
from selfplay.models.weights import sequence_logps
from selfplay.processes.child import Child
from selfplay.training.jobs import TrainJob
from selfplay.training.train_job import train

CANARIES = [[1, 5, 9, 13, 2], [7, 8, 9]]


def checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A small random Llama with its tokenizer, chat template and generation config."""
    policy = model(seed, **({"tie_word_embeddings": True} | changes))
    policy.generation_config.temperature, policy.generation_config.do_sample = 0.7, True
    policy.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, policy: Path, n: int = 12, off: float = 0.0, seed: int = 0, **more: Any) -> Path:
    """Random pairs with the policy's own log-probabilities, `off` nats a token wrong, and the same in `more` columns."""
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    rows = []
    for i in range(n):
        prompt, chosen, rejected = (rng.integers(3, WORDS, rng.integers(2, 10)).tolist() for _ in range(3))
        row: dict[str, Any] = {"prompt_id": f"p{i}", "prompt_ids": prompt} | more
        for name, ids in (("chosen", [*chosen, 2]), ("rejected", [*rejected, 2])):
            whole, before = sequence_logps(model, [prompt + ids, prompt])
            row |= {f"{name}_ids": ids, f"{name}_logp": whole - before + off * len(ids)}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def job_of(world: Path, folder: Path, **changes: Any) -> TrainJob:
    settings: dict[str, Any] = {
        "pairs": world / "pairs.parquet",
        "policy": world / "policy",
        "reference": world / "policy",
        "initial": world / "policy",
        "work": folder / "work",
        "out": folder / "out",
        "beta": 0.1,
        "epsilon": 0.1,
        "learning_rate": 1e-2,
        "epochs": 3,
        "batch_pairs": 4,
        "micro_batch_pairs": 2,
        "max_length": 64,
        "seed": 2**63 + 5,
        "agreement_mean": 1e-4,
        "agreement_p99": 1e-3,
        "canary_ids": CANARIES,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return TrainJob(**(settings | changes))


def run(job: TrainJob) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []

    def report(step: int, steps: int, metrics: dict[str, Any], pace: dict[str, float]) -> None:
        if "micro_batch" not in pace:  # a step that takes longer than a second, on a busy machine
            seen.append((step, steps))

    result = train(job, report)
    assert result is not None
    json.dumps(result, allow_nan=False)
    return result, seen


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def fails(job: TrainJob, kind: str, words: str) -> None:
    with pytest.raises(TrainError, match=words) as error:
        run(job)
    assert (error.value.kind, bool(error.value.hint)) == (kind, True)
    assert not job.out.exists()


def start(folder: Path, *argv: str) -> Child:
    child = Child(
        "trainer", [*(argv or (sys.executable, "-m", "selfplay.training.trainer"))], run_dir=folder, log=folder / "trainer.log",
        env={"OMP_NUM_THREADS": "1"}, silence=240,
    )  # fmt: skip
    child.start()
    return child
