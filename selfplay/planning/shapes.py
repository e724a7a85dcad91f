"""The sizes of a transformer that decide on its memory and on its speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder, or a classifier with the body of one. All are counts of numbers, not of bytes."""

    parameters: int
    active: int
    """Parameters that a token passes: fewer than all in a mixture of experts."""
    layers: int
    hidden: int
    feed_forward: int
    """Width of the inner layer that a token passes, of all its experts together."""
    kv_width: int
    """Keys and values that the cache keeps of a token in one layer."""
    embeddings: int
    """Parameters of the input and the output embedding together."""

    @property
    def layer(self) -> float:
        """Parameters of one layer."""
        return (self.parameters - self.embeddings) / self.layers


def from_config(config: Mapping[str, Any], parameters: int) -> Shape | None:
    """The shape that a config.json of Hugging Face describes, of a model with so many parameters; None where it says too little."""
    text = config.get("text_config") or config
    try:
        layers, hidden, heads = (int(text[n]) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    except (KeyError, TypeError, ValueError):
        return None
    head = int(text.get("head_dim") or hidden // heads)
    width = int(text.get("intermediate_size") or 4 * hidden)
    experts = int(text.get("num_local_experts") or text.get("num_experts") or 1)
    chosen = min(int(text.get("num_experts_per_tok") or 1), experts)
    expert = int(text.get("moe_intermediate_size") or width) if experts > 1 else width
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return Shape(
        parameters=parameters,
        active=parameters - layers * (experts - chosen) * 3 * hidden * expert,
        layers=layers,
        hidden=hidden,
        feed_forward=chosen * expert,
        kv_width=2 * head * int(text.get("num_key_value_heads") or heads),
        embeddings=int(text.get("vocab_size") or 0) * hidden * (1 if tied else 2),
    )


def usual(parameters: int) -> Shape:
    """The shape that a dense model with so many parameters usually has: layers of 12 hidden² parameters, and hidden / 128 of them."""
    hidden = max(1, round((parameters * 128 / 12) ** (1 / 3)))
    return Shape(
        parameters=parameters,
        active=parameters,
        layers=max(1, round(hidden / 128)),
        hidden=hidden,
        feed_forward=round(3.5 * hidden),
        kv_width=hidden // 2,
        embeddings=parameters // 8,
    )
