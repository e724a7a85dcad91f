"""What the trainer child does for the stage `depth`: gradient features of the base pairs, their clusters, closeness."""

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from peft import get_peft_model
from torch import Tensor, distributed
from transformers.modeling_layers import GradientCheckpointingLayer

from selfplay.errors import DamagedError, TrainError
from selfplay.methods.depth import closeness_to_others, cluster, rank_correlation, sizes
from selfplay.methods.features import PairGradients
from selfplay.models import weights
from selfplay.models.kept import Kept
from selfplay.storage import folders, tables
from selfplay.training.jobs import FeaturesJob
from selfplay.training.train_job import lora_config
from selfplay.types import PairGradient

logger = logging.getLogger(__name__)

COLUMNS = ("prompt_id", "prompt_ids", "chosen_ids", "rejected_ids", "kept_because")


def features(
    job: FeaturesJob, on_done: Callable[[int], None], kept: Kept | None = None
) -> dict[str, float | None] | None:
    """Do a job; every process of a distributed run calls it, takes its share of the pairs, and rank 0 gets the result.

    Each process holds the whole policy in `job.dtype`. The result, metrics by name, None for one that is not defined:
    `clusters`; `closeness_mean` and `closeness_std`; `closeness_to_others` (mean, see `depth`);
    `closeness_length_correlation` (Spearman, with the tokens of both responses: summed gradients follow length) and
    `closeness_size_correlation` (with the size of the cluster);
    `zero_gradients` and `nonfinite_gradients` (pairs); `seconds_load`, `seconds_features` and `seconds_cluster`.
    `on_done` gets the number of pairs that are done. `kept`: where the process keeps models from order to order. Raises
    TrainError.
    """
    started = time.perf_counter()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    pairs = read_pairs(job.pairs)
    device = _own_device()
    policy, reference = load(job, kept)
    weights.require_memory(policy, reference)
    policy, reference = (None if one is None else one.to(device) for one in (policy, reference))
    loaded = time.perf_counter()
    found = torch.zeros(len(pairs), job.dim)
    loss = {name: getattr(job, name) for name in ("beta", "epsilon", "label_smoothing", "nll_weight")}
    try:
        gradients = PairGradients(policy, job.dim, job.seed, layers=job.layers, reference=reference)
    except ValueError as error:
        raise TrainError("input", str(error), "set depth.layers, or depth.method to uniform") from error
    with gradients:
        for number, rows in enumerate(batches([tokens(pair) for pair in pairs], job.micro_batch_pairs)):
            if number % world != rank:
                continue
            batch = {name: ids.to(device) for name, ids in collate([pairs[i] for i in rows]).items()}
            found[rows] = gradients(batch, **loss).cpu()
            if rank == 0:
                on_done(min(len(pairs), (number + world) * job.micro_batch_pairs))
    if world > 1:  # each row is 0 in all processes but one
        distributed.all_reduce(found)
    del policy, reference, gradients
    if torch.cuda.is_available():  # training follows
        gc.collect()
        torch.cuda.empty_cache()
    computed = time.perf_counter()
    if rank:
        return None
    labels, closeness = cluster(found.numpy(), job.clusters, job.seed)
    others = closeness_to_others(found.numpy(), labels)
    if job.closeness == "others":
        closeness = others
    responses = [len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs]
    norms = found.double().norm(dim=1).numpy()
    _write(job.out, [pair["prompt_id"] for pair in pairs], labels, closeness, norms, found.numpy())
    finite = closeness[np.isfinite(closeness)]
    metrics = {
        "clusters": len(set(labels[labels >= 0].tolist())),
        "closeness_mean": finite.mean() if finite.size else math.nan,
        "closeness_std": finite.std() if finite.size else math.nan,
        "closeness_to_others": np.nanmean(others) if np.isfinite(others).any() else math.nan,
        "closeness_length_correlation": rank_correlation(closeness, responses),
        "closeness_size_correlation": rank_correlation(closeness, sizes(labels)),
        "zero_gradients": (norms == 0).sum(),
        "nonfinite_gradients": (~np.isfinite(norms)).sum(),
        "seconds_load": loaded - started,
        "seconds_features": computed - loaded,
        "seconds_cluster": time.perf_counter() - computed,
    }
    logger.info("gradient features of %d pairs: %s", len(pairs), metrics)
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of sequences (n,) in batches of like length, the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + size] for start in range(0, len(order), size)]


def collate(pairs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch as the trainer's collator makes it: rows [chosen; rejected], padded on the right, (2B, T)."""
    rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    batch = {
        name: torch.zeros(len(rows), longest, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        batch["input_ids"][i, :end] = torch.tensor([*prompt, *response])
        batch["attention_mask"][i, :end] = 1
        batch["completion_mask"][i, len(prompt) : end] = 1
    return batch


def tokens(pair: dict[str, Any]) -> int:
    """Tokens of the longer row of a pair."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """The pairs that were kept. Raises TrainError for a file without any."""
    try:
        rows = tables.read_whole(path, COLUMNS).to_pylist()
    except (OSError, DamagedError) as error:
        raise TrainError("input", f"{path} is no Parquet file of pairs: {error}", "write it again") from error
    pairs = [row for row in rows if row["kept_because"] is not None]
    if not pairs:
        raise TrainError("input", f"{path} has no pair that was kept", "there is nothing to take gradients of")
    if bad := [p["prompt_id"] for p in pairs if not (p["prompt_ids"] and p["chosen_ids"] and p["rejected_ids"])]:
        raise TrainError("input", f"{path}: the pair of prompt {bad[0]} lacks a prompt or a response", "drop the pair")
    return pairs


def load(job: FeaturesJob, kept: Kept | None = None) -> tuple[Any, Any]:
    """The policy, with the adapter that is to be trained, and the reference, None where it is the policy. On the CPU."""
    dtype, kept = getattr(torch, job.dtype), kept or Kept(keeps=False)

    def read(folder: Path) -> Any:
        # In float32 what training starts from; below that what serves.
        if dtype == torch.float32:
            return kept.shared(weights.masters(folder), job.trust_remote_code).eval()
        return weights.load(folder, dtype, job.trust_remote_code).eval()

    with _whole_models():
        policy = read(job.policy)
        reference = None if job.reference.resolve() == job.policy.resolve() else read(job.reference)
    if job.lora is not None:
        # Training draws its own A, from the state that random numbers are left in; this one is one more projection.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed % 2**63)
            try:
                policy = get_peft_model(policy, lora_config(job.lora))
            except ValueError as error:
                raise TrainError("input", str(error), "change train.lora.target_modules") from error
    if job.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for block in policy.modules():  # blocks recompute only in training; their parts stay without dropout
            if isinstance(block, GradientCheckpointingLayer):
                block.training = True
    return policy, reference


@contextmanager
def _whole_models() -> Iterator[None]:
    """Let every process read the checkpoint: for FSDP, which spreads rank 0's, transformers gives the others zeros."""
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def _own_device() -> torch.device:
    """The device of this process. From here on its GPU is the one that is meant where none is named.

    Asked for its free memory, another GPU would get a context of half a gigabyte from each process.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _write(
    path: Path, prompt_ids: Sequence[str], labels: np.ndarray, closeness: np.ndarray, norms: np.ndarray,
    found: np.ndarray,
) -> None:  # fmt: skip
    table = pa.table(
        {
            "prompt_id": prompt_ids,
            "cluster": pa.array(labels, mask=labels < 0),
            "closeness": pa.array(closeness, mask=np.isnan(closeness)),
            "norm": norms,
        },
        schema=tables.schema(PairGradient),
    )
    rows = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
    with folders.whole(path) as partial:
        pq.write_table(table.append_column("feature", rows), partial, write_page_checksum=True)
