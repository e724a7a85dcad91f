"""What is asked of a running `vllm serve`: its routes for developers, and log-probabilities.

Facts of vLLM 0.32 that decide this. While it is paused every request waits, those of canaries too. A reload of files that it
does not see answers with an error, and the next request then kills the engine, unless a good reload comes before. A shape that
does not fit cannot be mended. The routes are there with VLLM_SERVER_DEV_MODE=1 alone, and no key guards them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from reward.http import Answer, HttpError, InvalidAddress, ask, bearer
from reward.proxies import proxy_of
from selfplay.errors import PublishError

SECONDS = 60.0  # for an answer that needs no weights; canaries may wait behind other requests
MOST = 8 * 2**20  # bytes of an answer
EXTENSION = "--worker-extension-cls selfplay.generation.worker.WorkerOrders"
DEV = "start it with VLLM_SERVER_DEV_MODE=1, at an address that only this machine or this network reaches"


class Server:
    """One server. Making it and all methods raise PublishError."""

    def __init__(self, url: str, key: str | None, proxy_env: str | None) -> None:
        self.url = url.rstrip("/")
        try:
            self._headers = {"content-type": "application/json"} | ({"authorization": bearer(key)} if key else {})
        except ValueError as error:
            raise PublishError(f"{self.url} cannot be asked: {error}", "look at publish.api_key_env") from None
        self._key, self._proxy_env = key, proxy_env
        self._model = ""

    def open(self) -> str:
        """See whether weights can be put into it; returns the place that its model was loaded from."""
        with self._as_vllm():
            models = [
                row for row in self._ask("GET", "/v1/models")["data"] if not row.get("parent")
            ]  # adapters have one
            self._model, root = str(models[0]["id"]), str(models[0]["root"])
        if self._say("GET", "/is_paused").status == 404:
            raise PublishError(f"{self.url} takes no new weights: its routes for developers are off", DEV)
        with self._as_vllm():
            engines = [self._ask("GET", f"/get_world_size?include_dp={dp}")["world_size"] for dp in ("true", "false")]
        if engines[0] != engines[1]:
            raise PublishError(
                f"{self.url} runs several engines (data parallel), and only one of them could be shown to be renewed",
                "run a server for each, and name all of them in publish.vllm",
            )
        return root

    def logps(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Summed log-probabilities (nats) of the tokens 1 … T−1 of each sequence under the weights that it serves."""
        body = {
            "model": self._model, "prompt": [list(ids) for ids in sequences], "max_tokens": 1, "temperature": 0.0,
            "prompt_logprobs": 0,
        }  # fmt: skip
        with self._as_vllm():
            choices = sorted(self._ask("POST", "/v1/completions", body)["choices"], key=lambda choice: choice["index"])
            steps = [choice["prompt_logprobs"][1:] for choice in choices]
            return [
                math.fsum(step[str(token)]["logprob"] for token, step in zip(ids[1:], each, strict=True))
                for ids, each in zip(sequences, steps, strict=True)
            ]

    @contextlib.contextmanager
    def _as_vllm(self) -> Iterator[None]:
        """An answer of another form is that of another service."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise PublishError(
                f"{self.url} is no vLLM of a known version: its answer lacks {error}", "vLLM 0.32 is known"
            ) from None

    @property
    def paused(self) -> bool:
        with self._as_vllm():
            return bool(self._ask("GET", "/is_paused")["is_paused"])

    def pause(self) -> None:
        """Freeze requests. Those that run go on after `resume`, from the tokens that they have."""
        self._ask("POST", "/pause?mode=keep")

    def resume(self) -> None:
        self._ask("POST", "/resume")

    def reload(self, path: str, seconds: float) -> None:
        """Read weights in place, and forget all that was computed with those of before. Only while it is paused."""
        self._ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}}, seconds)
        if self._ask("POST", "/reset_prefix_cache?reset_running_requests=true").get("success") is not True:
            raise PublishError(f"{self.url} did not empty its prefix cache, which has keys of the old weights")

    def rpc(self, method: str, *arguments: str) -> list[Any]:
        """What each worker of a server answers that was started with EXTENSION; nothing without it."""
        answer = self._say("POST", "/collective_rpc", {"method": method, "args": list(arguments)}, SECONDS)
        return list(json.loads(answer.content)["results"]) if answer.success else []

    def _ask(self, method: str, path: str, body: Any = None, seconds: float = SECONDS) -> Any:
        """The answer as JSON, {} for an empty one."""
        answer = self._say(method, path, body, seconds)
        if answer.status in (401, 403):
            raise PublishError(f"{self.url} refuses the key ({answer.status})", "name it in publish.api_key_env")
        if not answer.success:
            said = " ".join(answer.said(self._key).split())
            raise PublishError(f"{self.url} answers {answer.status} to {path.partition('?')[0]}: {said}", "see its log")
        try:
            return json.loads(answer.content) if answer.content else {}
        except (ValueError, RecursionError):
            raise PublishError(f"{self.url} is no vLLM: its answer to {path} is no JSON") from None

    def _say(self, method: str, path: str, body: Any = None, seconds: float = SECONDS) -> Answer:
        content = None if body is None else json.dumps(body).encode()
        try:
            return ask(
                method, self.url + path, seconds=seconds, limit=MOST, body=content, headers=self._headers,
                proxy=proxy_of(self._proxy_env),
            )  # fmt: skip
        except (HttpError, InvalidAddress) as error:
            why = f"{self.url} does not answer ({type(error).__name__}: {error})"
            raise PublishError(why, "see whether it runs, and where") from None
