"""The stage `score`: an external reward for each candidate, from a supervised reward server or a URL."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from reward.client import RewardClient, RewardRefused, RewardUnavailable
from selfplay import artifacts
from selfplay.children import PATIENT, Child, ChildDied
from selfplay.config import RewardConfig
from selfplay.errors import InputError, Interrupted, RewardError
from selfplay.types import Candidate, Message, Prompt, Scored

Answer = TypeVar("Answer")
RESTARTS = 3  # of a reward server that dies within one call


class RewardService:
    """Rewards for (messages, response) items: from `config.url`, or from a server that runs as a child of ours.

    A child that dies while it is asked is started again at the same address; the client's retries bridge the gap.
    """

    def __init__(
        self,
        config: RewardConfig,
        run_dir: Path,
        *,
        name: str = "reward",
        gpus: Sequence[int] | None = None,
        on_event: Callable[[str, str], None],
    ) -> None:
        self._config, self._run_dir, self._name, self._on_event = config, run_dir, name, on_event
        gpu_env = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        self._env = {"OMP_NUM_THREADS": "1", **gpu_env}
        self.log = run_dir / "logs" / f"{name}.log"
        self._child: Child | None = None
        self._port = 0  # any free one at first; kept for restarts
        self._client: RewardClient | None = None

    def start(self) -> None:
        """Start the server, if it is ours; returns at once."""
        if self._config.url or self._child is not None:
            return
        assert self._config.model is not None
        argv = [sys.executable, "-m", "reward.server", "--model", self._config.model, "--port", str(self._port)]
        argv += ["--dtype", self._config.dtype, "--device", self._config.device]
        argv += ["--trust-remote-code"] if self._config.trust_remote_code else []
        child = Child(self._name, argv, run_dir=self._run_dir, log=self.log, env=self._env, silence=PATIENT)
        child.start()
        self._child = child

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._child is not None:
            self._child.stop()
            self._child = None

    def score(
        self, items: Sequence[tuple[list[Message], str]], on_progress: Callable[[int], None] | None = None
    ) -> list[float | None]:
        """One finite number for each item, or None where the item itself cannot be scored.

        Raises RewardError when the reward stays down, InputError when the server refuses the model or the request.
        """
        return self._ask(lambda client: client.score(items, on_progress=on_progress))

    @property
    def identity(self) -> str:
        """What scores: SHA-256 of the weights and of the template, as the server says."""
        health = self._ask(lambda client: client.health())
        return f"{health.weights_sha256}/{health.template_sha256}"

    def _ask(self, call: Callable[[RewardClient], Answer]) -> Answer:
        """Do `call` with a server that is kept alive meanwhile."""
        client = self._ready()
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,), name=f"{self._name}-watch", daemon=True)
        if self._child is not None:
            watch.start()
        try:
            return call(client)
        except RewardRefused as error:
            raise InputError(f"the {self._name} server refuses: {error}", self._hint()) from error
        except RewardUnavailable as error:
            raise RewardError(f"the {self._name} is unavailable: {error}", self._hint()) from error
        finally:
            done.set()
            if watch.is_alive():
                watch.join()

    def _ready(self) -> RewardClient:
        if self._child is not None and not self._child.alive:
            self._on_event("warning", f"the {self._name} server died; starting it again")
            self._child.stop()
            self._child = None
            self.start()
            self._wait_until_it_serves()
        if self._client is None:
            self.start()
            url = self._config.url or [self._wait_until_it_serves()]
            self._client = RewardClient(
                url,
                batch_size=self._config.batch,
                concurrency=self._config.concurrency,
                timeout=self._config.timeout,
                deadline=self._config.deadline,
            )
        return self._client

    def _wait_until_it_serves(self) -> str:
        assert self._child is not None
        try:
            url = str(self._child.wait_for("ready")["url"])
        except ChildDied as error:
            self._child = None
            message = f"the {self._name} server for {self._config.model} did not start: {last_line(self.log)}"
            failure = InputError if "exit code 2" in str(error) else RewardError
            raise failure(message, self._hint()) from error
        self._port = int(url.rpartition(":")[2])
        return url

    def _watch(self, done: threading.Event) -> None:
        """Start a dead server again while somebody waits for its answers; gives up after RESTARTS times."""
        for _ in range(RESTARTS):
            while self._child is None or self._child.alive:
                if done.wait(0.2):
                    return
            self._on_event("warning", f"the {self._name} server died; starting it again")
            self._child.stop()
            self._child = None
            try:
                self.start()
                self._wait_until_it_serves()
            except Interrupted:
                return
            except (InputError, RewardError) as error:
                self._on_event("warning", str(error))
                return

    def _hint(self) -> str:
        if self._config.url:
            return f"see that {', '.join(self._config.url)} answers, then run the same command again"
        return f"see {self.log}, then run the same command again"


def last_line(log: Path) -> str:
    """The last line that says something in a log, for an error message."""
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8192))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def score(
    service: RewardService,
    prompts: dict[str, Prompt],
    candidates: Sequence[Candidate],
    *,
    shards: Path,
    shard_items: int,
    max_missing: float,
    on_progress: Callable[[int], None],
    before_shard: Callable[[], None] = lambda: None,
) -> list[Scored]:
    """Scored candidates in their order; finished shards in `shards` are read, not scored again.

    Raises RewardError when more than a share `max_missing` has no score: missing rewards never become training data.
    """
    shards.mkdir(parents=True, exist_ok=True)
    rows: list[Scored] = []
    for start in range(0, len(candidates), shard_items):
        part = candidates[start : start + shard_items]
        path = shards / f"{start:08d}.parquet"
        if not path.exists():
            before_shard()
            items = [(prompts[c.prompt_id].messages, c.text) for c in part]
            values = service.score(items, lambda done, start=start: on_progress(start + done))  # type: ignore[misc]
            artifacts.write_rows(path, [_scored(c, v) for c, v in zip(part, values, strict=True)], Scored)
        rows += artifacts.read_rows(path, Scored)
        on_progress(start + len(part))
    require([r.reward for r in rows], max_missing, service.log)
    return rows


def require(values: Sequence[float | None], max_missing: float, log: Path) -> None:
    """Raise RewardError when more than a share `max_missing` of the values is None."""
    missing = sum(v is None for v in values)
    if missing > max_missing * len(values):
        raise RewardError(
            f"{missing} of {len(values)} answers have no reward (limit: a share of {max_missing:g}, reward.max_missing)",
            f"see why in {log}; nothing was trained on",
        )


def _scored(candidate: Candidate, value: float | None) -> Scored:
    fields = {f.name: getattr(candidate, f.name) for f in dataclasses.fields(candidate)}
    assert value is None or math.isfinite(value), "the client lets only finite scores through"
    return Scored(**fields, reward=value)


def metrics(rows: Sequence[Scored]) -> dict[str, float]:
    values = [r.reward for r in rows if r.reward is not None]
    result: dict[str, float] = {"missing": len(rows) - len(values)}
    if values:
        result |= {"reward_mean": float(np.mean(values)), "reward_std": float(np.std(values))}
    return result
