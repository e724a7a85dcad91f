"""The generator's child: a vLLM engine that takes orders (`python -m selfplay.generation.engine`). No other module imports vLLM.

Orders are JSON lines (see `selfplay.processes.protocol`). Each is answered by a result, or by an error of kind input, shape,
oom, disk or internal. Prompts come from files and answers go to files, so that no token id passes through the controller.
`prompts` is a file of `Prompt` rows, `answers` and `out` are files of `Candidate` rows, prompt by prompt. An engine on another
node than the controller is told the hashes of the files that an order is about, and checks them first (`storage/seen.py`).

    load             {model, dtype, seed, max_model_len, max_num_seqs, gpu_memory_utilization, tensor_parallel, nodes,
                     trust_remote_code, sleep_mode}                         → what runs (version, device, block size, …)
    generate         {prompts, start, count, seeds: one a prompt, policy: the version that answers, out,
                     sampling: {n, temperature, top_p, top_k, stop, max_tokens, stop_token_ids},
                     thinking: {start, end, hidden}; null or left out: the policy does not think}
                     → n answers to each of `count` prompts are in the file `out`: {rows, tokens, seconds}
    answer_logps     {prompts, answers, start, count, per_prompt, greedy}   → summed nats of `count` answers, each; with
                     `greedy` pairs of them and of whether every token was the likeliest
    logps            {sequences: [{token_ids, start}]}                      → summed nats of tokens start … T-1, each
    reload           {path}                                                 → the weights are replaced in place
    reset            {}                                                     → the prefix cache is empty
    canary_generate  {prompt_ids, seed, n}                                  → {token_ids, logps, cached_tokens}
    compare_weights  {path}                                                 → {supported, compared, max_abs_diff, why}
    forget           {}                                                     → every weight is 0, before a reload: {supported}
    sleep {level}, wake {tags}                                              → {supported}
    drop             {}                                                     → orders in flight are forgotten, and not answered

`generate` is answered when its last answer is done, and the next orders are taken meanwhile: with two of them in flight the
engine never waits for the slowest answer of a shard. All other orders are done one after another.

On a CPU the engine lives in this very process, since vLLM's three processes start three times slower and decode no faster.
Chunked prefill is off there: vLLM 0.32 dies when it cuts a prompt whose request has a seed («CPU Generator does not use
offset»), which happens as soon as the prompts of one step exceed its token budget.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from selfplay.generation.flights import Flights
from selfplay.generation.liveness import ProcessesGone, end, end_with_them, was_killed
from selfplay.generation.orders import LATER, OrderError, take_orders
from selfplay.generation.writing import Answer, write
from selfplay.models.thinking import Said, Thinking
from selfplay.processes.protocol import Channel, Event, protocol, quick_imports
from selfplay.storage import answers, tables

Kept = TypeVar("Kept")

CPU_BLOCK = 32  # tokens in a block of the KV cache: the smallest that vLLM's CPU attention takes
CPU_BATCHED_TOKENS = 4096  # vLLM's own budget of a step on a CPU
SEEDS = 2**62  # seeds are taken modulo this, so that seed + n fits 64 bits with a sign


def prepare(cpu: bool, threads: int) -> None:
    """Settings that have to be there before torch and vLLM are imported."""
    os.environ.update(VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
    if cpu:
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would go before the size that `load` gives
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING=os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
            OMP_NUM_THREADS=str(threads),  # without it every process takes all cores, and they fight
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            # Kernels are made for each number of tokens in a step. oneDNN would keep 1,024 of them, hundreds of MiB after
            # some hundred rounds, beside those that vLLM keeps for each layer.
            ONEDNN_PRIMITIVE_CACHE_CAPACITY="16",
        )


def cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True  # vllm-cpu


class Engine:
    """A vLLM engine and the orders it knows."""

    def __init__(self, channel: Channel, cpu: bool, kv_cache_bytes: int) -> None:
        """`kv_cache_bytes`: on a CPU alone; vLLM takes them at once, and writes zeros to all of them."""
        self.flights = Flights(channel)
        self._cpu, self._kv_cache_bytes = cpu, kv_cache_bytes
        self._llm: Any = None
        self._sleep_mode = False

    def load(self, order: Event) -> dict[str, Any]:
        import vllm
        from vllm.platforms import current_platform

        began = time.monotonic()
        model, length = order["model"], order["max_model_len"]
        if not (Path(model) / "config.json").is_file():
            raise OrderError("input", f"{model} has no config.json: it is not a Hugging Face checkpoint")
        settings: dict[str, Any] = {"gpu_memory_utilization": order["gpu_memory_utilization"]}
        if self._cpu:
            settings = {
                "enforce_eager": True,
                "block_size": CPU_BLOCK,
                "kv_cache_memory_bytes": self._kv_cache_bytes,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, length),
            }
        if order["nodes"] > 1:  # vLLM asks the cluster for its workers, each with a GPU
            settings |= {"pipeline_parallel_size": order["nodes"], "distributed_executor_backend": "ray"}
        self._sleep_mode = bool(order["sleep_mode"]) and not self._cpu
        self._llm = None
        try:
            self._llm = vllm.LLM(
                model=model,
                dtype=order["dtype"],
                seed=order["seed"],
                max_model_len=length,
                max_num_seqs=order["max_num_seqs"],
                tensor_parallel_size=order["tensor_parallel"],
                trust_remote_code=order["trust_remote_code"],
                enable_sleep_mode=self._sleep_mode,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",  # temperature 1, the full vocabulary
                generation_config="vllm",  # every sampling parameter is explicit
                worker_extension_cls="selfplay.generation.worker.WorkerOrders",
                **settings,
            )
        except RuntimeError as error:
            raise (ProcessesGone(str(error)) if was_killed(error) else error) from error
        config = self._llm.llm_engine.vllm_config
        device = "cpu" if self._cpu else current_platform.get_device_name()
        return {
            "vllm": vllm.__version__,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "device": device,
            "block_size": config.cache_config.block_size,
            "max_model_len": config.model_config.max_model_len,
            "eos_ids": end_tokens(Path(model)),
            "supports_sleep": self._sleep_mode,
            "seconds": time.monotonic() - began,
        }

    def generate(self, order: Event) -> object:
        from vllm import SamplingParams

        began = time.monotonic()
        sampling, start = order["sampling"], order["start"]
        names: list[str] = []
        prompts: list[list[int]] = []
        params = []
        asked = answers.each_prompt(Path(order["prompts"]), start, order["count"])
        for (name, ids), seed in zip(asked, order["seeds"], strict=True):
            self._check(ids, self._room - sampling["max_tokens"], f"prompt {name} (number {start + len(names)})")
            names.append(name)
            prompts.append(ids.tolist())
            params.append(SamplingParams(**sampling, seed=seed % SEEDS, logprobs=0))
        thinking = Thinking(self._engine.get_tokenizer(), **order["thinking"]) if order.get("thinking") else None
        self.flights.launch(
            self._engine,
            order,
            prompts,
            params,
            keep=partial(_said, thinking),
            finish=partial(write, order, names, began),
        )
        return LATER

    def answer_logps(self, order: Event) -> list[float] | list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        groups = answers.with_prompts(
            Path(order["prompts"]),
            Path(order["answers"]),
            start=order["start"],
            count=order["count"],
            per_prompt=order["per_prompt"],
        )
        for sequences in groups:  # a row group at a time: all log-probabilities of a round would not fit into memory
            for ids, _ in sequences:
                self._check(ids, self._room - 1, "an answer behind its prompt")
            found += self._logps(order, [(ids.tolist(), begin) for ids, begin in sequences], len(found), order["count"])
        return found if order["greedy"] else [logp for logp, _ in found]

    def logps(self, order: Event) -> list[float]:
        sequences = [(sequence["token_ids"], sequence["start"]) for sequence in order["sequences"]]
        for i, (ids, begin) in enumerate(sequences):
            self._check(np.array(ids), self._room - 1, f"sequence (number {i})")
            if not 1 <= begin < len(ids):
                raise OrderError("input", f"start {begin} leaves no token of {len(ids)}")
        return [logp for logp, _ in self._logps(order, sequences, 0, len(sequences))]

    def _logps(
        self, order: Event, sequences: Sequence[tuple[list[int], int]], before: int, total: int
    ) -> list[tuple[float, bool]]:
        """Of each (token_ids, start): summed nats of the tokens from `start` on, and whether each of them was the likeliest."""
        from vllm import SamplingParams

        # Such a request never reads the prefix cache.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        ids = [ids for ids, _ in sequences]
        found = self._run(order, ids, [params.clone() for _ in ids], _prompt_logps, before, total)
        return [
            (_finite(math.fsum(logps[begin - 1 :])), bool((ranks[begin - 1 :] == 1).all()))
            for (logps, ranks), (_, begin) in zip(found, sequences, strict=True)
        ]

    def reload(self, order: Event) -> dict[str, Any]:
        began = time.monotonic()
        assert not self.flights.busy, "weights are not changed under requests"
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": order["path"]})
        if self._cpu:
            self._engine.collective_rpc("renew_packed_weights")
        return {"seconds": time.monotonic() - began}

    def reset(self, order: Event) -> dict[str, Any]:
        """Empty the prefix cache, which `reload` leaves full of the old weights' keys and values."""
        if not self._engine.reset_prefix_cache():
            raise OrderError("internal", "the prefix cache could not be emptied: requests are in flight")
        return {}

    def canary_generate(self, order: Event) -> dict[str, Any]:
        from vllm import SamplingParams

        n, prompt_ids = order["n"], order["prompt_ids"]
        self._check(np.array(prompt_ids), self._room - n, "canary prompt")
        params = SamplingParams(max_tokens=n, seed=order["seed"] % SEEDS, logprobs=0, ignore_eos=True, detokenize=False)
        (output,) = self._run(order, [prompt_ids], [params], lambda output: output)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        logps = [_finite(step[t].logprob) for t, step in zip(token_ids, completion.logprobs, strict=True)]
        return {"token_ids": token_ids, "logps": logps, "cached_tokens": output.num_cached_tokens}

    def compare_weights(self, order: Event) -> dict[str, Any]:
        found: list[dict[str, Any]] = self._engine.collective_rpc("compare_weights", args=(order["path"],))
        return found[0]

    def forget(self, order: Event) -> dict[str, Any]:
        return {"supported": all(self._engine.collective_rpc("forget_weights"))}

    def sleep(self, order: Event) -> dict[str, Any]:
        if self._sleep_mode:
            self._engine.sleep(level=order["level"])
        return {"supported": self._sleep_mode}

    def wake(self, order: Event) -> dict[str, Any]:
        if self._sleep_mode:
            self._engine.wake_up(tags=order["tags"])
        return {"supported": self._sleep_mode}

    def drop(self, order: Event) -> dict[str, Any]:
        self.flights.drop()
        return {}

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise OrderError("input", "no model is loaded")
        return self._llm

    @property
    def _model_config(self) -> Any:
        return self._engine.llm_engine.vllm_config.model_config

    @property
    def _room(self) -> int:
        """The most tokens of a prompt and its answer."""
        return int(self._model_config.max_model_len)

    def _check(self, ids: NDArray[np.integer], most: int, what: str) -> None:
        if not 1 <= len(ids) <= most:
            raise OrderError("input", f"{what} has {len(ids)} tokens; the engine has room for 1 to {most}")
        vocabulary = self._model_config.get_vocab_size()
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise OrderError("input", f"{what} has token ids outside 0 … {vocabulary - 1}")

    def _run(
        self,
        order: Event,
        prompts: Sequence[Sequence[int]],
        params: Sequence[Any],
        keep: Callable[[Any], Kept],
        before: int = 0,
        total: int | None = None,
    ) -> list[Kept]:
        """What `keep` makes of the output of each prompt, in order; with `before` and `total` for its progress."""
        flight = self.flights.launch(self._engine, order, prompts, params, keep, before=before, total=total)
        return self.flights.wait(flight)


def _said(thinking: Thinking | None, output: Any) -> list[Answer]:
    """The answers in the output to one prompt."""
    if thinking is None:
        return [_answer(completion) for completion in output.outputs]
    opened = thinking.opened(output.prompt_token_ids)
    return [
        _answer(each, thinking.read(np.array(each.token_ids, np.int32), each.text, opened)) for each in output.outputs
    ]


def _answer(completion: Any, said: Said | None = None) -> Answer:
    """said: what there is to read of it, where the policy thinks."""
    if completion.finish_reason not in ("stop", "length"):
        raise OrderError("internal", f"a candidate ended with finish_reason {completion.finish_reason}")
    return Answer(
        text=completion.text if said is None else said.text,
        token_ids=np.array(completion.token_ids, np.int32),
        logp=_finite(completion.cumulative_logprob),
        # One that ended amid its thoughts has not answered: to pairs, penalties and gate it is as good as cut off.
        finish_reason=completion.finish_reason if said is None or said.left else "length",
        thinking=None if said is None else said.thinking,
    )


def _prompt_logps(output: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Nats (T − 1,) of the tokens 1 … T−1 of a prompt, and their ranks (T − 1,), 1 for the likeliest."""
    ids, steps = output.prompt_token_ids, output.prompt_logprobs
    said = [steps[t][ids[t]] for t in range(1, len(ids))]
    return np.array([each.logprob for each in said]), np.array([each.rank for each in said])


def _finite(logp: float) -> float:
    if not math.isfinite(logp):
        raise OrderError("internal", f"the policy gave a log-probability of {logp}", "its weights may be damaged")
    return logp


def end_tokens(model: Path) -> list[int]:
    """End-of-sequence tokens of a checkpoint: of its generation_config, else of its config."""
    for name in ("generation_config.json", "config.json"):
        file = model / name
        ends = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def main() -> None:
    channel = protocol()
    parser = argparse.ArgumentParser(description="vLLM engine that takes orders as JSON lines on stdin")
    parser.add_argument("--cpu-threads", type=int, default=1, help="OpenMP threads (CPU only)")
    parser.add_argument("--cpu-kv-cache-gib", type=float, default=1.0, help="memory for the KV cache (GiB, CPU only)")
    options = parser.parse_args()
    cpu = cpu_build()
    prepare(cpu, options.cpu_threads)
    # Imports are most of the start, and overlap with what the controller does meanwhile.
    with quick_imports():
        import vllm
        from vllm import LLM, SamplingParams  # noqa: F401  vLLM itself imports them when they are asked for
        from vllm.v1.engine.exceptions import EngineDeadError

        if cpu:
            import vllm.v1.worker.cpu_worker

    tables.leave_pandas_out()
    print(f"vLLM {vllm.__version__} is imported", file=sys.stderr)
    engine = Engine(channel, cpu, int(options.cpu_kv_cache_gib * 2**30))
    known: dict[str, Callable[[Event], Any]] = {
        "load": engine.load,
        "generate": engine.generate,
        "answer_logps": engine.answer_logps,
        "logps": engine.logps,
        "reload": engine.reload,
        "reset": engine.reset,
        "canary_generate": engine.canary_generate,
        "compare_weights": engine.compare_weights,
        "forget": engine.forget,
        "sleep": engine.sleep,
        "wake": engine.wake,
        "drop": engine.drop,
    }
    threading.Thread(target=end_with_them, args=(lambda: engine._llm,), name="liveness", daemon=True).start()
    try:
        take_orders(channel, known, fatal=(EngineDeadError, ProcessesGone), work=engine.flights)
    except (EngineDeadError, ProcessesGone) as error:
        end(str(error))


if __name__ == "__main__":
    main()
