"""How long the work of a round takes on GPUs, from tokens, arithmetic and bandwidth. Estimates, within a third or so.

The shares of the peak that each kind of work reaches are what is commonly reported for models of some billion parameters.
"""

from __future__ import annotations

import math

from selfplay.planning.devices import Device
from selfplay.planning.shapes import Shape

READ = 0.85  # share of the memory's bandwidth that decoding reaches
DECODE, SCORE, DEPTH, TRAIN = 0.6, 0.45, 0.3, 0.33  # shares of the peak arithmetic
STEP = 2e-3  # seconds of a decoding step for sampling and scheduling
REDUCE = 3e-5  # seconds of an all-reduce, of which each layer has two where an engine is split over GPUs
FULL = 0.9  # share of the time in which an engine decodes as many sequences as it may
PADDING = 1.18  # tokens of a training batch with its padding, over those without
DISK = 1e9  # bytes a second, read, written or copied, of one process
COPY = 4e9  # bytes a second of a model that is in main memory already, to a GPU
HASH = 2e9  # bytes a second of SHA-256
IMPORTS = 20.0  # seconds until a process has imported its libraries and can begin to load
SWAP = 15.0  # seconds until new weights are in an engine and shown to be there
WAKE = 5.0  # seconds until an engine has given its memory back, or taken it


def decoding_step(shape: Shape, device: Device, *, sequences: int, context: float, parallel: int) -> float:
    """Seconds of one decoding step of an engine that is split over `parallel` GPUs. `context`: mean tokens of a sequence so far."""
    read = 2 * shape.active + sequences * context * shape.layers * shape.kv_width * 2  # bytes, in bf16
    talk = 2 * shape.layers * REDUCE if parallel > 1 else 0.0
    arithmetic = 2 * shape.active * sequences / (DECODE * device.flops)
    return (read / (READ * device.bandwidth) + arithmetic) / parallel + talk + STEP


def sampling(
    shape: Shape, device: Device, *, answers: int, prompt: float, answer: float, engines: int, parallel: int, most: int
) -> float:
    """Seconds until `engines` have sampled all answers. `most`: sequences that one of them decodes at a time."""
    together = max(1, min(most, math.ceil(answers / engines)))
    step = decoding_step(shape, device, sequences=together, context=prompt + answer / 2, parallel=parallel)
    waves = answers / engines / together
    return (
        waves * answer * step / (FULL if waves > 1 else 0.5)
    )  # of a single wave, few sequences are as long as the longest


def scoring(shape: Shape, device: Device, *, tokens: float, gpus: int) -> float:
    """Seconds of one forward pass over so many tokens."""
    return 2 * shape.active * tokens / (SCORE * device.flops * gpus)


def features(shape: Shape, device: Device, *, tokens: float, gpus: int) -> float:
    """Seconds of one forward and backward pass, for the gradients of pairs."""
    return 6 * shape.active * tokens / (DEPTH * device.flops * gpus)


def training(shape: Shape, device: Device, *, tokens: float, gpus: int, lora: bool, checkpointing: bool) -> float:
    """Seconds of all optimizer steps over so many tokens: the policy forward and backward, the reference forward.

    An adapter needs no gradients of the weights; recomputed activations are another forward pass.
    """
    passes = (4 if lora else 6) + (2 if checkpointing else 0) + 2
    return passes * shape.active * tokens * PADDING / (TRAIN * device.flops * gpus)
