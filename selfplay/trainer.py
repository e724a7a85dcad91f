"""The trainer child: `python -m selfplay.trainer`, directly, through `accelerate launch -m` or through `torchrun -m`.

It pays for its imports while other stages run, says «ready» and waits for orders on stdin, with no CUDA context until
one comes. Orders, each answered with one result or one error (see `children.py` for the protocol):

    {"order": "train", "job": TrainJob}        pairs → checks → ε-DPO → an exported policy and what is known of it
    {"order": "canaries", "job": CanaryJob}    log-probabilities of fixed sequences under a checkpoint
    {"order": "exit"}

With several processes only rank 0 reads orders and reports progress; the others are told by it. After an error in a
distributed run every process ends, since the others may wait in a collective call. The kinds of error are those of
`TrainError`, and «disk». A job that finds whole checkpoints of the same job in `work` goes on from the last one and, on
a CPU with one thread, ends with the same bytes as an undisturbed run.
"""

import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfplay.children import Channel, Event, protocol, quick_imports
from selfplay.errors import DiskError, TrainError

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16", "float16"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class LoraJob(BaseModel):
    """A fresh adapter, merged in float32 after training. No dropout: the steps of β would be noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: Count = 16
    alpha: Positive = 32.0
    target_modules: list[str] | str = "all-linear"


class TrainJob(BaseModel):
    """One round's training. Paths are folders unless they say otherwise; log-probabilities are nats, lengths tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: Path
    """Parquet file: prompt_id, prompt_ids, chosen_ids, rejected_ids (list of int), chosen_logp, rejected_logp (float64,
    the generator's summed log-probabilities)."""
    policy: Path
    """Checkpoint to start from; its `masters/` where it has one."""
    reference: Path
    """Checkpoint of the reference; may be the policy."""
    initial: Path
    """Checkpoint whose tokenizer, chat template and generation config every export carries, byte for byte."""
    work: Path
    """Scratch for training checkpoints; a job that is repeated resumes from here."""
    out: Path
    """Where the trained policy goes; appears whole or not at all."""

    serving_dtype: Dtype = "float32"
    lora: LoraJob | None = None
    beta: Positive
    epsilon: Annotated[float, Field(ge=0, lt=1)] = 0.01
    beta_min: Annotated[float, Field(ge=0)] | None = None
    beta_max: Positive | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    learning_rate: Positive
    epochs: Positive = 1.0
    batch_pairs: Count
    """Pairs of an optimizer step, over all processes."""
    micro_batch_pairs: Count
    """Pairs of one forward and backward in one process."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """0 leaves gradients as they are."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_length: Count
    """Longest prompt and response together; a longer pair is an error, never truncated."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0 for none."""
    seed: int = 0
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads of torch on the CPU; 0 leaves its choice."""
    gradient_checkpointing: bool = False
    bf16: bool = False
    """Mixed precision: matrix products in bf16, weights and losses in float32."""
    agreement_mean: Positive | None = None
    """Largest mean of |reference logp − generator's logp| / tokens over the responses; None where the reference is not
    the policy that sampled."""
    agreement_p99: Positive | None = None
    min_update: Annotated[float, Field(ge=0)] = 0.0
    """Smallest relative norm of the update that counts as one."""
    canary_ids: list[list[int]] = []
    trust_remote_code: bool = False


class CanaryJob(BaseModel):
    """Token sequences to score under a checkpoint as it would be served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Path
    dtype: Dtype = "float32"
    canary_ids: list[list[int]]
    trust_remote_code: bool = False


def failure(error: Exception) -> TrainError:
    """What a job's exception means to the one who ordered it."""
    from selfplay.weights import out_of_memory

    if isinstance(error, TrainError):
        return error
    if isinstance(error, ValidationError):
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return TrainError("input", f"the job is not valid: {wrong}", "see selfplay.trainer.TrainJob")
    if out_of_memory(error):
        return TrainError(
            "oom", f"out of memory: {error}",
            "lower micro_batch_pairs, turn gradient_checkpointing on, use LoRA, or shorten max_tokens",
        )  # fmt: skip
    # torch and safetensors say so only in words
    if isinstance(error, DiskError) or "no space left" in str(error).lower() or "inline_container" in str(error):
        return TrainError("disk", f"the disk is full: {error}", "free some space: training resumes from its checkpoint")
    return TrainError("internal", f"{type(error).__name__}: {error}", "the trainer's log has the whole traceback")


def obey(order: Event, channel: Channel, rank: int) -> bool:
    """Carry out one order and answer it; False after an error."""
    from selfplay import train_job

    def report(step: int, steps: int, metrics: dict[str, float | None]) -> None:
        channel.progress(order, step=step, steps=steps, metrics=metrics)

    try:
        if order["order"] == "train":
            result = train_job.train(TrainJob.model_validate(order["job"]), report)
        elif order["order"] == "canaries":
            result = train_job.canaries(CanaryJob.model_validate(order["job"])) if rank == 0 else None
        else:
            raise TrainError("input", f"unknown order {order['order']!r}", "known: train, canaries, exit")
    except Exception as error:  # the boundary: whatever it is, the one who ordered hears of it
        logger.exception("order %s failed", order["id"])
        found = failure(error)
        # A line longer than a pipe's atomic write could mix with another rank's.
        channel.error(order, found.kind, str(found)[:2000], found.hint)
        return False
    if rank == 0:
        channel.result(order, result)
    return True


def shared_orders(channel: Channel, rank: int, world: int) -> Iterator[Event]:
    """Orders as they come; with several processes each gets those that rank 0 reads."""
    if world == 1:
        yield from channel.orders()
        return
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend)
    # Its own group: orders may be hours apart, while a collective of the training that hangs should time out.
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
    source = channel.orders() if rank == 0 else iter(())
    while True:
        box: list[Event | None] = [next(source, None)]
        distributed.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
        if box[0] is None:
            distributed.destroy_process_group()
            return
        yield box[0]


def main() -> None:
    channel = protocol()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports each trainer that is built
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    with quick_imports():
        import selfplay.train_job  # noqa: F401  the seconds that are to be spent before an order comes

    if rank == 0:
        channel.ready()
    for order in shared_orders(channel, rank, world):
        if not obey(order, channel, rank) and world > 1:
            sys.exit(1)


if __name__ == "__main__":
    main()
