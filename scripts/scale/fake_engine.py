#!/usr/bin/env python
"""An engine without a model, for measurements: it takes the orders of `selfplay.generation.engine` and answers at once.

Put its path into `selfplay.generation.installing.ENGINE`, and a real `Generator` starts it, loads and swaps policies in it,
and has it sample. Its answers have 591 tokens in the mean (a gamma distribution, cut at `max_tokens`) of ids below 150,000,
and about 2.3 kB of text. They depend on the seeds alone. A log-probability depends on the tokens and a little on the policy,
so that log-ratios between policies are small and not zero.

A policy is a folder with any safetensors file and a config.json. Its canaries come from its manifest.json; those of a policy
outside the run, which is policy 0, come from the manifest in the run's folder that names it as its source.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

from selfplay.generation.orders import take_orders  # noqa: E402
from selfplay.processes.protocol import Channel, Event, protocol  # noqa: E402
from selfplay.processes.reaping import RUN_MARKER  # noqa: E402
from selfplay.storage import answers, tables  # noqa: E402
from selfplay.types import Candidate  # noqa: E402

VOCABULARY = 150_000
MEAN_TOKENS, SHAPE = 591, 3.0
CHARACTERS = 3.9  # of text, for each token
BOOK = 8_000_000  # characters that texts are cut from
BLOCK = 32


class FakeEngine:
    """The orders, and the policy that was loaded or reloaded last."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._path = Path()

    def load(self, order: Event) -> dict[str, Any]:
        self._path = Path(order["model"])
        return {
            "vllm": "none",
            "dtype": order["dtype"],
            "device": "none",
            "block_size": BLOCK,
            "max_model_len": order["max_model_len"],
            "eos_ids": [2],
            "supports_sleep": False,
            "seconds": 0.0,
        }

    def reload(self, order: Event) -> dict[str, Any]:
        self._path = Path(order["path"])
        return {"seconds": 0.0}

    def reset(self, order: Event) -> dict[str, Any]:
        return {}

    def generate(self, order: Event) -> dict[str, Any]:
        began = time.monotonic()
        n, most, path = order["sampling"]["n"], order["sampling"]["max_tokens"], Path(order["prompts"])
        names = [name for name, _ in answers.each_prompt(path, order["start"], order["count"])]
        ids: list[NDArray[np.int32]] = []
        texts: list[str] = []
        for seed in order["seeds"]:
            rng = np.random.default_rng(seed)
            lengths = np.clip(rng.gamma(SHAPE, MEAN_TOKENS / SHAPE * 1.06, n), 8, most).astype(int)
            ids += [rng.integers(3, VOCABULARY, length, np.int32) for length in lengths]
            for length, place in zip(lengths, rng.integers(0, BOOK // 2, n), strict=True):
                texts.append(self._book[place : place + int(CHARACTERS * length)])
        rows = answers.table(
            prompt_ids=names,
            per_prompt=n,
            texts=texts,
            token_ids=ids,
            logps=[self._logp(each) for each in ids],
            finish_reasons=["stop" if len(each) < most else "length" for each in ids],
            policy=order["policy"],
        )
        with tables.writing_to(Path(order["out"]), Candidate) as file:
            file.table(rows)
        tokens = sum(map(len, ids))
        self._channel.progress(order, done=len(names), total=len(names), tokens=tokens)
        return {"rows": rows.num_rows, "tokens": tokens, "seconds": time.monotonic() - began}

    def answer_logps(self, order: Event) -> list[float]:
        groups = answers.with_prompts(
            Path(order["prompts"]),
            Path(order["answers"]),
            start=order["start"],
            count=order["count"],
            per_prompt=order["per_prompt"],
        )
        found: list[float] = []
        for group in groups:
            found += [self._logp(ids[begin:]) for ids, begin in group]
            self._channel.progress(order, done=len(found), total=order["count"], tokens=0)
        return found

    def logps(self, order: Event) -> list[float]:
        known = self._canaries()
        found = []
        for sequence in order["sequences"]:
            ids, start = sequence["token_ids"], sequence["start"]
            canary = known.get(tuple(ids)) if start == 1 else None
            found.append(self._logp(np.array(ids[start:])) if canary is None else canary)
        return found

    def canary_generate(self, order: Event) -> dict[str, Any]:
        rng = np.random.default_rng(order["seed"])
        ids = [int(rng.integers(3, VOCABULARY)) for _ in range(order["n"])]
        return {"token_ids": ids, "logps": [self._logp([each]) for each in ids], "cached_tokens": 0}

    def compare_weights(self, order: Event) -> dict[str, Any]:
        return {"supported": True, "compared": 1, "max_abs_diff": 0.0, "why": ""}

    def unsupported(self, order: Event) -> dict[str, Any]:
        return {"supported": False}

    @cached_property
    def _book(self) -> str:
        rng = np.random.default_rng(5)
        letters = np.array(list("etaoinshrdlucmfwyp"))
        words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(5000)]
        return " ".join(words[i] for i in rng.integers(0, len(words), BOOK // 5))

    def _logp(self, ids: Sequence[int] | NDArray[Any]) -> float:
        """Summed nats: about −0.9 a token, of which a hundredth is the policy's own."""
        mixed = np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        salt = hashlib.blake2b(str(self._path.resolve()).encode(), digest_size=8).digest()
        own = (mixed ^ np.uint64(int.from_bytes(salt, "big"))) * np.uint64(0xBF58476D1CE4E5B9)
        return -float((1.8 * (mixed >> np.uint64(40)) + 0.02 * ((own >> np.uint64(40)) - 2.0**23)).sum() / 2**24)

    def _canaries(self) -> dict[tuple[int, ...], float]:
        """The log-probabilities that the manifest of the policy gives to its canaries."""
        for file in (
            self._path / "manifest.json",
            *sorted(Path(os.environ[RUN_MARKER]).glob("policies/*/manifest.json")),
        ):
            if file.is_file():
                manifest = json.loads(file.read_text(encoding="utf-8"))
                folder = Path(manifest.get("source") or file.parent)
                if folder.resolve() == self._path.resolve():
                    canaries = manifest["canaries"]
                    return dict(zip(map(tuple, canaries["token_ids"]), canaries["logps"], strict=True))
        return {}


def main() -> None:
    tables.leave_pandas_out()
    channel = protocol()
    engine = FakeEngine(channel)
    known: dict[str, Callable[[Event], Any]] = {
        "load": engine.load,
        "generate": engine.generate,
        "answer_logps": engine.answer_logps,
        "logps": engine.logps,
        "reload": engine.reload,
        "reset": engine.reset,
        "canary_generate": engine.canary_generate,
        "compare_weights": engine.compare_weights,
        "forget": engine.unsupported,
        "sleep": engine.unsupported,
        "wake": engine.unsupported,
        "drop": engine.reset,
    }
    take_orders(channel, known)


if __name__ == "__main__":
    main()
