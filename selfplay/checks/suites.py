"""Looks at the benchmarks between rounds: files are read as a round reads them, and tasks of the harness are loaded.

A task is loaded by a process of its own and without a network, because its libraries are heavy and a look changes nothing on
disk. Where its data are on the Hub and not in the cache, the Hub is asked whether a round could fetch them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from reward.http import HttpError, ask
from selfplay.checks.finding import Finding
from selfplay.config import Config, SuiteConfig
from selfplay.evaluation import harness
from selfplay.processes.children import inherited_environment
from selfplay.rounds import suites

SECONDS = 300.0  # for the imports of the harness, and a task's data
HUB, HUB_SECONDS = "https://huggingface.co", 5.0


def benchmarks(config: Config, run_dir: Path) -> Iterator[Finding]:
    """A finding for each suite: can it be asked?"""
    for suite in config.evaluate.suites:
        key = f"evaluate.suites {suite.name}"
        if suite.file is None:
            yield _task(key, suite)
            continue
        rows = suites.read(config, suite)
        kind = "of multiple choice" if suite.reward is None else "whose answers a reward scores"
        often = "every round" if suite.every == 1 else f"every {suite.every} rounds"
        asked = len(rows) if suite.prompts is None else min(suite.prompts, len(rows))
        yield Finding.ok(key, f"{asked:,} of {len(rows):,} rows {kind}, {often}{_veto(config, suite)}")


def _veto(config: Config, suite: SuiteConfig) -> str:
    if suite.gate is None:
        return "; it is reported only"
    return (
        f"; it vetoes a fall of more than {suite.gate.max_drop:g} at {config.evaluate.gate.confidence:.0%} confidence"
    )


def _task(key: str, suite: SuiteConfig) -> Finding:
    harness.require_harness(suite)
    root = str(Path(__file__).resolve().parents[2])
    environment = inherited_environment() | {
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", harness.MODULE, suite.model_dump_json()],
        capture_output=True, text=True, timeout=SECONDS, env=environment,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding.error(key, f"the process that loads the task {suite.task} ended: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["why"] is None:
        return Finding.ok(key, f"the task {suite.task} loads, with {found['documents']:,} documents")
    if found["offline"] and (why := _no_network()) is None:
        text = f"the data of the task {suite.task} are not here: the first round that asks it downloads them"
        return Finding.warning(key, text)
    return Finding.error(key, found["why"] + (f"; the Hub does not answer ({why})" if found["offline"] else ""))


def _no_network() -> str | None:
    """Why the Hub cannot be reached; None where it can. It is reached as a child does it, by the proxy of the environment."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") or os.environ.get("HF_DATASETS_OFFLINE", "0") not in (
        "0",
        "",
    ):
        return "HF_HUB_OFFLINE is set"
    try:
        url = os.environ.get("HF_ENDPOINT", HUB)
        parts = urlsplit(url)
        proxy = None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)
        ask("HEAD", url, seconds=HUB_SECONDS, limit=0, proxy=proxy)
    except (HttpError, ValueError) as error:
        return type(error).__name__
    return None
