"""How many bytes of a GPU each role holds while it works. Sums of what is known to be kept; buffers of kernels come on top."""

from __future__ import annotations

from selfplay.planning.shapes import Shape

GIB = 1 << 30
FP32, BF16 = 4, 2  # bytes
MOMENTS = 8  # bytes a trained parameter: the two moments of AdamW, in fp32
CONTEXT = GIB / 2  # what CUDA itself takes of a GPU for each process
NCCL = GIB  # buffers of a process that talks to others
ASLEEP = 1.5 * GIB  # what an engine keeps while it sleeps: its context, and graphs that were not given back


def working(shape: Shape, tokens: int, width: int) -> float:
    """Activations of one layer for so many tokens, in numbers of `width` bytes.

    Eight of the hidden size are kept (the inputs of two norms and of the attention, queries, keys, values, and two
    outputs), and four of the inner one (gate, up, activated, product). Attention itself keeps no scores.
    """
    return tokens * (8 * shape.hidden + 4 * shape.feed_forward) * width


def adapter(shape: Shape, rank: int) -> int:
    """Parameters of a LoRA adapter on all linear layers."""
    per_rank = 9 * shape.hidden + shape.kv_width + 3 * shape.feed_forward
    return shape.layers * rank * per_rank


def trainer(
    shape: Shape,
    *,
    processes: int,
    shares: int,
    rank: int | None,
    reference: bool,
    tokens: int,
    bf16: bool,
    checkpointing: bool,
) -> dict[str, float]:
    """What each of the trainer's GPUs holds in an optimizer step, in bytes by what it is.

    `shares`: processes that a model is spread over (FSDP2), of all `processes`. There each holds its share of weights, moments,
    gradients (fp32, sharded after every micro-batch) and of the reference. Two layers and the embeddings are gathered at a
    time. `rank`: of a LoRA adapter; None where all weights are trained. `reference`: whether it has weights of its own. With an
    adapter the policy's base is the reference, unless it is another policy. `tokens`: of a micro-batch of one process.
    """
    width = BF16 if bf16 else FP32
    trained = shape.parameters if rank is None else adapter(shape, rank)
    weights = shape.parameters + (0 if rank is None else trained)
    kept = tokens * shape.hidden * width * shape.layers if checkpointing else 0
    at_a_time = working(shape, tokens, width) * (1 if checkpointing else shape.layers)
    parts = {
        "weights": weights * FP32 / shares,
        "optimizer": trained * MOMENTS / shares,
        "gradients": trained * FP32 / shares,
        "reference": shape.parameters * FP32 / shares if reference else 0.0,
        "gathered": (2 * shape.layer + shape.embeddings) * width if shares > 1 else 0.0,
        "activations": kept + at_a_time,
        "CUDA": CONTEXT + (NCCL if processes > 1 else 0),
    }
    return {name: size for name, size in parts.items() if size}


def reward(shape: Shape, width: int, tokens: int) -> dict[str, float]:
    """What a reward model holds on each of its GPUs while it scores a batch of so many tokens. `width`: bytes of a number."""
    return {"weights": shape.parameters * width, "activations": working(shape, tokens, width), "CUDA": CONTEXT}
