"""Whether vLLM's own processes are still there. An engine without them is of no use, and vLLM may wait for them for ever.

On a GPU the engine core is a process of its own, and with tensor parallelism there is a worker process for each GPU. Somebody
may kill one of them: the kernel when memory runs out, a driver, or a person. vLLM 0.32 notices it and sets a flag, but calls
that wait for an answer of the core go on waiting. This module runs in the engine's child and does not import vLLM.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

LOOK = 0.25  # seconds between two looks
GONE = 70  # exit code of a child that ended for this reason


class ProcessesGone(Exception):
    """vLLM's own processes were killed."""


def end_with_them(llm: Callable[[], Any]) -> None:
    """End this process once they are gone, whatever its other threads do. The controller then starts another one."""
    while True:
        time.sleep(LOOK)
        if gone(llm()):
            end("they were killed")


def end(why: str) -> None:
    """End this process at once: its other threads may wait for ever."""
    print(f"vLLM's own processes are gone ({why}): this one ends too", file=sys.stderr, flush=True)
    os._exit(GONE)


def gone(llm: Any) -> bool:
    """Whether a `vllm.LLM` has lost its engine core or one of its workers; not so where there is none yet."""
    if llm is None:
        return False
    client = llm.llm_engine.engine_core
    resources = getattr(client, "resources", None)
    if resources is not None:  # the core is a process of its own
        return bool(resources.engine_dead)
    return bool(getattr(client.engine_core.model_executor, "is_failed", False))


def was_killed(error: RuntimeError) -> bool:
    """Whether an engine core did not start because it was killed. vLLM names its exit code."""
    return re.search(r"core proc\(s\): \{.*: -9\b", str(error)) is not None
