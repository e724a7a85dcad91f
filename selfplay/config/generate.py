"""The section `generate`: how candidates are sampled, and the engine that samples them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from selfplay.config.base import Positive, Section


class EngineConfig(Section):
    max_model_len: Positive | None = None
    """Context of the engine (tokens). The default is prompts.max_tokens + generate.max_tokens, with room for the
    canaries."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of the GPU's memory for vLLM (GPU only)."""
    tensor_parallel: Positive = 1
    """GPUs that one copy of the policy is split over."""
    max_num_seqs: Positive = 256
    """Sequences decoded at a time."""
    cpu_threads: Positive | None = 1
    """OpenMP threads of each engine (CPU only). With one, an answer in float32 has the same bytes whatever is sampled beside it, so
    a run that was disturbed ends as any other; `generate.engines` then takes more cores. With more threads the last bits depend
    on the batch. null: the cores that an engine has to itself, which are those that reward models of ours leave, shared among
    the engines."""
    cpu_kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """Memory for the KV cache (GiB, CPU only)."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """Times a dead engine is started again within one call, with back-off."""
    silence: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a sign of progress after which the engine is taken for hung."""


class GenerateConfig(Section):
    candidates: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for a prompt (K)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature. The stored log-probabilities are always those at temperature 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the share of the probability that is sampled from. 1 keeps every token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """How many of the likeliest tokens are sampled from. 0 keeps every token."""
    max_tokens: Positive = 512
    """Longest response (tokens)."""
    stop_token_ids: list[int] | None = None
    """Tokens that end a response. The default is the end-of-sequence tokens of the policy's generation_config."""
    shard_prompts: Positive = 64
    """Prompts in a shard. An interruption loses the answers of one shard at most."""
    engines: Positive | list[list[int]] = 1
    """Engines that sample side by side: their number, or a list with the GPUs of each. Each has
    `generate.engine.tensor_parallel` GPUs."""
    min_engines: Positive = 1
    """Engines that have to be left for the sampling to go on when others fail."""
    engine: EngineConfig = EngineConfig()
    """The vLLM engine."""

    @property
    def engine_count(self) -> int:
        """How many engines there are."""
        return self.engines if isinstance(self.engines, int) else len(self.engines)

    @model_validator(mode="after")
    def _engines_fit(self) -> GenerateConfig:
        if isinstance(self.engines, list):
            if not self.engines:
                raise ValueError("engines is an empty list: name the GPUs of one engine at least")
            size = self.engine.tensor_parallel
            if wrong := [group for group in self.engines if len(group) != size]:
                raise ValueError(
                    f"engines has a group of {len(wrong[0])} GPUs, {wrong[0]}, but each engine is split over "
                    f"engine.tensor_parallel = {size}"
                )
            named = [gpu for group in self.engines for gpu in group]
            if twice := [gpu for gpu in named if named.count(gpu) > 1]:
                raise ValueError(f"engines names GPU {twice[0]} twice: every engine has GPUs of its own")
            if min(named) < 0:
                raise ValueError(f"engines names GPU {min(named)}: numbers begin at 0")
        if self.min_engines > self.engine_count:
            raise ValueError(f"min_engines = {self.min_engines} is more than the {self.engine_count} engines there are")
        return self
