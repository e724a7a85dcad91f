"""The trainer child: `python -m selfplay.training.trainer`, directly, through `accelerate launch -m` or through `torchrun -m`.

It pays for its imports while other stages run, says «ready» and waits for orders on stdin, with no CUDA context until
the first one comes. Orders, each answered with one result or one error (see `selfplay/processes/protocol.py`):

    {"order": "train", "job": TrainJob}        pairs → checks → ε-DPO → an exported policy and what is known of it
    {"order": "embed", "job": EmbedJob}        embeddings of prompts, and which of them stand for all
    {"order": "render", …}                     conversations to token ids, as the importer does (see models/rendering.py)
    {"order": "encode", …}                     texts to token ids
    {"order": "features", "job": FeaturesJob}  projected gradients of pairs, their clusters, and closeness to these
    {"order": "blend", "job": BlendJob}        a reference that has moved towards a policy
    {"order": "canaries", "job": CanaryJob}    log-probabilities of fixed sequences under a checkpoint
    {"order": "exit"}

A trainer on another node than the controller is told the hashes of the files that an order is about, and checks them first, once
a node (`storage/seen.py`). With several processes only rank 0 reads orders and reports progress; the others are told by it. After an error in a
distributed run every process ends, since the others may wait in a collective call. The kinds of error are those of
`TrainError`, and «disk». A job that finds whole checkpoints of the same job in `work` goes on from the last one and, on
a CPU with the same number of threads, ends with the same bytes as an undisturbed run. An order ends with the same bytes
whatever the process did before it (`training/between.py`).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from selfplay.errors import CheckpointError, DiskError, InputError, TrainError
from selfplay.processes.protocol import Channel, Event, protocol, quick_imports
from selfplay.storage import seen
from selfplay.training.jobs import CLUSTERS, BlendJob, CanaryJob, EmbedJob, FeaturesJob, TrainJob

if TYPE_CHECKING:
    from selfplay.models.kept import Kept

logger = logging.getLogger(__name__)

# Longer than the slowest disk needs for a save, for which ranks wait in a collective call; `train.silence` ends a hang.
COLLECTIVE = timedelta(hours=2)


def failure(error: Exception) -> TrainError:
    """What a job's exception means to the one who ordered it."""
    from selfplay.models.weights import out_of_memory

    if isinstance(error, TrainError):
        return error
    if isinstance(error, InputError):
        return TrainError("input", str(error), error.hint)
    if isinstance(error, CheckpointError):  # another try, or another node, may see what was written
        return TrainError("internal", str(error), error.hint)
    if isinstance(error, ValidationError):
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return TrainError("input", f"the job is not valid: {wrong}", "see selfplay.training.jobs")
    if out_of_memory(error):
        return TrainError(
            "oom", f"out of memory: {error}",
            "lower micro_batch_pairs, turn gradient_checkpointing on, use LoRA, or shorten max_tokens",
        )  # fmt: skip
    # torch and safetensors say so only in words
    if isinstance(error, DiskError) or "no space left" in str(error).lower() or "inline_container" in str(error):
        return TrainError("disk", f"the disk is full: {error}", "free some space: training resumes from its checkpoint")
    return TrainError("internal", f"{type(error).__name__}: {error}", "the trainer's log has the whole traceback")


def obey(order: Event, channel: Channel, rank: int, kept: Kept) -> bool:
    """Carry out one order and answer it, once its memory was given back; False after an error."""
    from selfplay.models import rendering
    from selfplay.training import between, blend_job, depth_job, embed_job, train_job

    def report(step: int, steps: int, metrics: dict[str, float | None], pace: dict[str, float]) -> None:
        channel.progress(order, step=step, steps=steps, metrics=metrics, pace=pace)

    def done(count: int) -> None:
        channel.progress(order, done=count)

    result: Any
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each node
            seen.require(order)
        if order["order"] == "train":
            result = train_job.train(TrainJob.model_validate(order["job"]), report, kept)
        elif order["order"] == "features":
            pairs = FeaturesJob.model_validate(order["job"])
            result = depth_job.features(pairs, done, kept)
        elif order["order"] == "blend":
            result = blend_job.blend(BlendJob.model_validate(order["job"]), kept) if rank == 0 else None
        elif order["order"] == "canaries":
            result = train_job.canaries(CanaryJob.model_validate(order["job"])) if rank == 0 else None
        elif order["order"] == "render":
            result = rendering.run_render(order) if rank == 0 else None
        elif order["order"] == "encode":
            result = rendering.run_encode(order) if rank == 0 else None
        elif order["order"] == "embed":
            job = EmbedJob.model_validate(order["job"])
            result = embed_job.embed(job, done, kept) if rank == 0 else None
        else:
            raise TrainError(
                "input",
                f"unknown order {order['order']!r}",
                "known: train, features, embed, blend, render, encode, canaries, exit",
            )
    except Exception as error:  # the boundary: whatever it is, the one who ordered hears of it
        logger.exception("order %s failed", order["id"])
        found = failure(error)
        # A line longer than a pipe's atomic write could mix with another rank's.
        channel.error(order, found.kind, str(found)[:2000], found.hint)
        return False
    between.give_back()
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
    distributed.init_process_group(backend, timeout=COLLECTIVE)
    # Its own group: orders may be days apart, while a collective of the training that hangs should time out.
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
    with quick_imports():  # the seconds that are to be spent before an order comes
        import selfplay.training.depth_job
        import selfplay.training.train_job  # noqa: F401
        from selfplay.models.kept import Kept
        from selfplay.training.between import Beginning
    if CLUSTERS in sys.argv:
        import sklearn.cluster  # noqa: F401

    beginning, kept = Beginning(world), Kept(keeps=world == 1)
    if rank == 0:
        channel.ready()
    for order in shared_orders(channel, rank, world):
        beginning.restore()
        if not obey(order, channel, rank, kept) and world > 1:
            sys.exit(1)


if __name__ == "__main__":
    main()
