"""A Llama in plain torch, just large enough to build the tiny world: the model, its losses and its export.

Importing transformers takes longer than a tenth of the whole build, so the builder does without it. What it writes is an
ordinary Hugging Face checkpoint (`LlamaForCausalLM`, `LlamaForSequenceClassification`) with the same logits.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

THETA = 10_000.0
EPS = 1e-6


class Block(nn.Module):
    """One layer. The projections of query, key and value are one matrix, those of gate and up another."""

    def __init__(self, hidden: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Parameter(torch.randn(3 * hidden, hidden) * 0.6 / math.sqrt(hidden))
        self.out = nn.Parameter(torch.randn(hidden, hidden) * 0.3 / math.sqrt(hidden))
        self.between = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Parameter(torch.randn(2 * feed_forward, hidden) * 0.6 / math.sqrt(hidden))
        self.down = nn.Parameter(torch.randn(hidden, feed_forward) * 0.3 / math.sqrt(feed_forward))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: list[Tensor] | None, start: int) -> Tensor:
        """(B, T, H) to (B, T, H); `cache` holds keys and values (B, heads, positions, head size), filled up to `start`."""
        b, t, h = x.shape
        qkv = F.linear(F.rms_norm(x, (h,), self.before, EPS), self.qkv).view(b, t, 3, self.heads, h // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        both, value = qkv[:2], qkv[2]
        low, high = both.chunk(2, -1)
        both = both * turn[0] + torch.cat((-high, low), -1) * turn[1]
        query, key = both[0], both[1]
        if cache is not None:
            cache[0][:, :, start : start + t] = key
            cache[1][:, :, start : start + t] = value
            key, value = cache[0][:, :, : start + t], cache[1][:, :, : start + t]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=t > 1)
        x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, h), self.out)
        gate, up = F.linear(F.rms_norm(x, (h,), self.between, EPS), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Llama(nn.Module):
    """The body. Logits are `hidden @ table.T` (tied); a reward model adds `head`."""

    def __init__(
        self, vocabulary: int, hidden: int, layers: int, heads: int, feed_forward: int, positions: int
    ) -> None:
        super().__init__()
        self.shape = {
            "vocabulary": vocabulary,
            "hidden": hidden,
            "layers": layers,
            "heads": heads,
            "feed_forward": feed_forward,
        }
        self.shape["positions"] = positions
        self.table = nn.Parameter(torch.randn(vocabulary, hidden) * 0.1)
        self.blocks = nn.ModuleList(Block(hidden, heads, feed_forward) for _ in range(layers))
        self.after = nn.Parameter(torch.ones(hidden))
        size = hidden // heads
        angles = torch.outer(torch.arange(positions).float(), THETA ** (-torch.arange(0, size, 2).float() / size))
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, ids: Tensor, caches: list[list[Tensor]] | None = None, start: int = 0) -> Tensor:
        """(B, T) ids to (B, T, H) hidden states after the last norm. Padding goes to the right and needs no mask."""
        x = F.embedding(ids, self.table)
        turn = (self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]])
        for i, block in enumerate(self.blocks):
            x = block(x, turn, caches[i] if caches else None, start)
        return F.rms_norm(x, (x.shape[-1],), self.after, EPS)

    def empty_caches(self, rows: int, positions: int) -> list[list[Tensor]]:
        heads = self.shape["heads"]
        size = (rows, heads, positions, self.shape["hidden"] // heads)
        return [[torch.empty(size), torch.empty(size)] for _ in self.blocks]

    def state(self) -> dict[str, Tensor]:
        """The parameters under the names that Hugging Face's Llama gives them."""
        state = {"model.embed_tokens.weight": self.table, "model.norm.weight": self.after}
        for i, block in enumerate(self.blocks):
            at = f"model.layers.{i}."
            state |= {
                at + f"self_attn.{n}_proj.weight": part for n, part in zip("qkv", block.qkv.chunk(3), strict=True)
            }
            state |= {
                at + f"mlp.{n}_proj.weight": part
                for n, part in zip(("gate", "up"), block.gate_up.chunk(2), strict=True)
            }
            state |= {at + "self_attn.o_proj.weight": block.out, at + "mlp.down_proj.weight": block.down}
            state |= {
                at + "input_layernorm.weight": block.before,
                at + "post_attention_layernorm.weight": block.between,
            }
        return {name: value.detach().clone().contiguous() for name, value in state.items()}


def export(model: Llama, head: Tensor | None, out: Path, end: int, pad: int) -> None:
    """Writes config.json and model.safetensors: a causal model, or with a `head` (1, H) a sequence classifier."""
    shape = model.shape
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if head is None else "LlamaForSequenceClassification"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": shape["vocabulary"],
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "head_dim": shape["hidden"] // shape["heads"],
        "intermediate_size": shape["feed_forward"],
        "max_position_embeddings": shape["positions"],
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_theta": THETA, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "tie_word_embeddings": head is None,
        "use_cache": True,
    }
    state = model.state()
    if head is not None:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        state["score.weight"] = head.detach().clone()
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """(B, T) of the rows, filled on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def response_loss(model: Llama, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """Summed cross-entropy, in nats, of the response tokens."""
    ids = padded([[*p, *r] for p, r in zip(prompts, responses, strict=True)], 0)
    targets = padded([[-100] * len(p) + list(r) for p, r in zip(prompts, responses, strict=True)], -100)[:, 1:]
    wanted = targets >= 0
    hidden = model(ids)[:, :-1][wanted]
    return F.cross_entropy(F.linear(hidden, model.table), targets[wanted], reduction="sum")


def rewards(model: Llama, head: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """(B,) rewards of rendered conversations: the head (1, H) on the last token of each."""
    last = torch.tensor([len(row) - 1 for row in rows])
    return F.linear(model(padded(rows, 0))[torch.arange(len(rows)), last], head)[:, 0]


def all_rewards(model: Llama, head: Tensor, rows: Sequence[Sequence[int]], size: int = 128) -> list[float]:
    """`rewards` of any number of conversations, in batches of like length, without gradients."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            for i, value in zip(chunk, rewards(model, head, [rows[i] for i in chunk]).tolist(), strict=True):
                found[i] = value
    return found
