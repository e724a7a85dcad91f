"""What happens between two orders of a trainer that stays: nothing that one of them leaves behind is seen by the next.

A process that has done other orders before ends an order with the same bytes as a fresh one, and its memory does not grow.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState


class Beginning:
    """How the process was before its first order.

    `processes`: how many work together. They are joined by what accelerate knows of them, which is then left alone: they end
    after a round.
    """

    def __init__(self, processes: int) -> None:
        self._processes = processes
        if torch.cuda.is_available():  # the cores load, cast and copy; without a GPU OMP_NUM_THREADS tells
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
        self._environment = dict(os.environ)
        self._threads = torch.get_num_threads()
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        gc.collect()
        gc.freeze()  # what the imports have made stays: nobody has to look through it after each order

    def restore(self) -> None:
        """Make the process what it was: environment, threads, random numbers, and accelerate's idea of what it trains."""
        if dict(os.environ) != self._environment:  # transformers leaves precision and FSDP's settings there
            os.environ.clear()
            os.environ.update(self._environment)
        torch.set_num_threads(self._threads)
        python, numpy, own = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(torch.initial_seed())
        if self._processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def give_back() -> None:
    """Give back the memory of an order that is done, on the host and on the GPU; a context of CUDA stays."""
    gc.collect()  # a trainer and its model refer to each other
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
