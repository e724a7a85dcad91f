"""A real vLLM OpenAI server as a process of its own, for the tests of what is spoken with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

START = 600  # seconds; most of it are imports
KV_CACHE = 1 << 27  # bytes


@contextmanager
def vllm_server(folder: Path, *options: str) -> Iterator[str]:
    """The address of a vLLM server of the model in `folder`; it has ended, with its children, when the block ends."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder.with_name(f"{folder.name}-vllm.log")
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    argv += [
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--distributed-executor-backend",
        "vllm.v1.executor.uniproc_executor.UniProcExecutor",  # the worker in the engine's process: one process less to start
        "--kv-cache-memory-bytes",
        str(KV_CACHE),
        *options,
    ]
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    with log.open("wb") as out:  # its engine is a process of its own, which outlives it: both are in one group
        process = subprocess.Popen(
            argv, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START
        while not _serves(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
