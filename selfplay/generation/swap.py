"""Whether a checkpoint fits the running engine, and whether its weights are in there: pure decisions.

Distances are the largest difference over the canaries, in nats a token: |Σ logp − Σ logp'| / (T − 1) for a sequence of T
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selfplay.errors import CheckpointError
from selfplay.storage.tensors import TensorSpec

Evidence = Literal["shown", "refuted", "unclear"]

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# What the shapes of the tensors do not show, and the running engine would not notice.
FIXED_SETTINGS = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "rms_norm_eps", "vocab_size", "tie_word_embeddings", "sliding_window",
)  # fmt: skip
CANARY_BLOCKS = 3  # blocks of the KV cache that the generating canary's prompt spans
SEEDS = 3  # of the generating canary, before its error counts as one
EXACT, FRESH = 1e-4, 0.1
"""The largest distances (nats a token): of any engine in float32, and of a fresh one in less, whose noise is not known yet."""
ROUNDING = 0.02  # nats that a token's log-probability is off by in bfloat16, where two kernels compute it (docs/measurements.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """Short fixed sequences and their summed log-probabilities (nats) over tokens 1 … T−1 under some weights."""

    token_ids: list[list[int]]
    logps: list[float]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Canaries:
        """From the field `canaries` of a policy's manifest; raises CheckpointError when there are none."""
        found = cls(token_ids=manifest.get("token_ids", []), logps=manifest.get("logps", []))
        lengths = [len(ids) for ids in found.token_ids]
        if not lengths or len(found.logps) != len(lengths) or min(lengths) < 2:
            raise CheckpointError("the policy's manifest has no usable canaries", "export or import the policy again")
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapReport:
    policy: int
    method: Literal["canaries", "weights", "restart"]  # how the new weights were shown; restart: a fresh engine
    seconds: float  # from the call to verified weights
    seconds_to_first_token: float  # from the call to the first tokens sampled under the new weights
    to_new: float  # nats a token, engine ↔ values of the checkpoint
    to_parent: float | None  # nats a token, engine ↔ values of the policy that ran before
    gap: float | None  # nats a token between the two
    noise: float  # nats a token, of the engine against the policy that it started with
    prefix_error: float | None  # nats a token, generated after a cached prefix ↔ scored without the cache
    compared: int | None  # weights compared, where canaries could not tell
    restarted: bool


def canary_tokens(dtype: str) -> int:
    """Tokens of the generating canary: few where arithmetic is exact, and else so many that their noise averages out."""
    return 8 if dtype == "float32" else 64


def fresh_tolerance(dtype: str) -> float:
    """Largest distance (nats a token) of an engine that was just started from the policy that it was started with."""
    return EXACT if dtype == "float32" else FRESH


def tolerance(dtype: str, noise: float, tokens: int) -> float:
    """Largest distance (nats a token) after a swap, as a mean over `tokens` tokens.

    Below float32 it follows from the noise that the engine showed against the policy that it was started with. A small noise may
    have been luck, so it counts as at least what rounding leaves of a mean over so many tokens.
    """
    return EXACT if dtype == "float32" else 4 * max(noise, ROUNDING / math.sqrt(tokens))


def check_fits(
    running: Mapping[str, TensorSpec],
    new: Mapping[str, TensorSpec],
    running_config: Mapping[str, Any],
    new_config: Mapping[str, Any],
) -> None:
    """Raise CheckpointError unless the checkpoint has the tensors of the running one, by name and shape.

    vLLM cannot recover from a wrong shape, and accepts a missing tensor without a word. Any floating-point dtype will do:
    the engine casts. A tied output layer may be stored or not.
    """
    tied = bool(new_config.get("tie_word_embeddings"))
    optional = {"lm_head.weight"} if tied else set()
    faults = [f"{name} is missing" for name in sorted(running.keys() - new.keys() - optional)]
    faults += [f"{name} is not in the running model" for name in sorted(new.keys() - running.keys() - optional)]
    for name in sorted(running.keys() & new.keys()):
        (old_dtype, old_shape), (dtype, shape) = running[name], new[name]
        if old_shape != shape:
            faults.append(f"{name} has shape {list(shape)}, not {list(old_shape)}")
        elif dtype != old_dtype and not {dtype, old_dtype} <= FLOATS:
            faults.append(f"{name} has type {dtype}, not {old_dtype}")
    faults += [
        f"config.json: {key} is {new_config[key]}, not {running_config[key]}"
        for key in FIXED_SETTINGS
        if key in running_config and key in new_config and running_config[key] != new_config[key]
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the running model: {'; '.join(faults[:3])}{more}",
            "a run keeps one architecture; another one needs its own run folder",
        )


def distance(a: Sequence[float], b: Sequence[float], token_ids: Sequence[Sequence[int]]) -> float:
    """Largest |a − b| over sequences, nats a token; a and b are sums over tokens 1 … T−1, each (C,). Infinite for NaN."""
    each = [abs(x - y) / (len(ids) - 1) for x, y, ids in zip(a, b, token_ids, strict=True)]
    return max(each) if all(map(math.isfinite, each)) else math.inf


def judge(
    engine: Sequence[float], new: Canaries, parent: Canaries | None, noise: float, tolerance: float
) -> tuple[Evidence, float, float | None, float | None]:
    """What the engine's canary log-probabilities (C,) say, with the distances to new, to parent and between the two.

    refuted: further than the tolerance from the new values, or nearer to the parent's. shown: within the engine's noise of
    the new values, and the parent's lie further from them than twice that. unclear: neither; weights have to be compared.
    Without a parent there are no other weights to take them for: the tolerance decides.
    `noise` (nats a token) is what the engine showed against a policy that it was started with. It cannot be taken for
    smaller than a hundredth of the tolerance: another policy's rounding is another.
    """
    to_new = distance(engine, new.logps, new.token_ids)
    to_parent = gap = None
    if parent is None:
        return ("shown" if to_new <= tolerance else "refuted"), to_new, None, None
    if parent.token_ids == new.token_ids:
        to_parent = distance(engine, parent.logps, new.token_ids)
        gap = distance(new.logps, parent.logps, new.token_ids)
    noise = max(noise, tolerance / 100)
    if to_new > tolerance:
        return "refuted", to_new, to_parent, gap
    if to_parent is None or gap is None or not gap > 2 * noise:
        return "unclear", to_new, to_parent, gap
    if to_parent <= to_new:
        return "refuted", to_new, to_parent, gap
    return ("shown" if to_new <= noise else "unclear"), to_new, to_parent, gap


def prefix_prompt(token_ids: Sequence[Sequence[int]], block_size: int, context: int, n: int) -> list[int]:
    """Prompt of the generating canary: the canaries over and over, through several blocks of the KV cache.

    Only whole blocks are cached, so it ends half a block later; it leaves room for the `n` tokens that follow, and one more.
    """
    length = min(CANARY_BLOCKS * block_size + block_size // 2, context - n - 1)
    once = [token for ids in token_ids for token in ids]
    return [once[i % len(once)] for i in range(max(length, 1))]


def prefix_error(generated: Sequence[float], scored: float) -> float:
    """|Σ logp while generating after the cached prefix − the same scored without the cache|, nats a token."""
    error = abs(math.fsum(generated) - scored) / len(generated)
    return error if math.isfinite(error) else math.inf
