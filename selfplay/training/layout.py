"""How the tokens of a micro-batch are laid out for a forward pass, so that few are computed that nobody needs.

A collator's micro-batch has B chosen responses, then the B rejected ones of the same pairs, each behind its prompt and padded
on the right, (2B, T). `shared` makes one row of each pair, [prompt, chosen, rejected]: the prompt is computed once. The
rejected response sees the prompt and itself, at the positions that it has behind the prompt, so each token's hidden states are
those of its own sequence. `parts` puts pairs of like length together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfplay.training.batches import response

PART = 96
"""Tokens that a CPU computes in the time that one more forward and backward pass takes for itself."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a model is called with, and where in its hidden states the N tokens of the 2B responses are predicted."""

    inputs: dict[str, Tensor]
    mask: Tensor
    """(2B, R): one element for each token of a response, chosen responses first."""
    sources: Tensor
    """(N,): positions in the flattened hidden states, in the order of `mask`."""
    targets: Tensor
    """(N,): the tokens."""

    def at_responses(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, H) that predict the tokens of the responses, of all hidden states (rows, T, H)."""
        return hidden.flatten(0, 1).index_select(0, self.sources)


def separate(inputs: Mapping[str, Tensor]) -> Rows:
    """Each response in a row of its own, behind its prompt."""
    mask, targets = response(inputs)
    whole = torch.nn.functional.pad(mask, (0, 1))
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return Rows(given, mask, whole.flatten().nonzero().squeeze(1), targets)


def shared(inputs: Mapping[str, Tensor]) -> Rows:
    """Each pair in one row. The mask is (B, 1, T, T), true where a token (first T) sees another."""
    ids = inputs["input_ids"]
    lengths = inputs["completion_mask"].sum(dim=1)
    prompt = (inputs["attention_mask"].sum(dim=1) - lengths).chunk(2)[0].unsqueeze(1)
    (n_chosen, n_rejected), (chosen, rejected) = (one.unsqueeze(1) for one in lengths.chunk(2)), ids.chunk(2)
    width = int((prompt + n_chosen + n_rejected).max())
    column = torch.arange(width, device=ids.device).unsqueeze(0)
    # 0 in the prompt, 1 in the chosen response, 2 in the rejected one, 3 behind them.
    part = torch.zeros_like(column)
    for ends in (prompt, prompt + n_chosen, prompt + n_chosen + n_rejected):
        part = part + (column >= ends)
    positions = (column - n_chosen * (part >= 2)).clamp(max=ids.size(1) - 1)
    tokens = torch.where(part < 2, chosen.gather(1, positions), rejected.gather(1, positions))
    seen = (part.unsqueeze(1) == 0) | (part.unsqueeze(1) == part.unsqueeze(2))
    seen = seen & (column.unsqueeze(1) <= column.unsqueeze(2))

    token = torch.arange(int(lengths.max()), device=ids.device).unsqueeze(0)
    mask = token < lengths.unsqueeze(1)
    begins = torch.cat([prompt, prompt + n_chosen])
    row = torch.arange(len(chosen), device=ids.device).repeat(2).unsqueeze(1) * width
    before = torch.where(token == 0, prompt.repeat(2, 1) - 1, begins + token - 1)
    return Rows(
        {"input_ids": tokens, "attention_mask": seen.unsqueeze(1), "position_ids": positions},
        mask,
        (row + before)[mask],
        tokens.flatten()[(row + begins + token)[mask]],
    )


def may_share(model: Any) -> bool:
    """Whether a model says that it attends to whatever a mask of four dimensions shows it, in all layers.

    A window over the last tokens, a state that is handed from token to token, or a kernel that makes its own masks would not.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    windowed = getattr(config, "sliding_window", None) is not None and not layers
    return config._attn_implementation == "sdpa" and not windowed and set(layers) <= {"full_attention"}


def take(inputs: Mapping[str, Tensor], pairs: Sequence[int]) -> dict[str, Tensor]:
    """The micro-batch of some of its pairs, without the columns that none of them needs."""
    ids = inputs["input_ids"]
    rows = torch.tensor([*pairs, *(len(ids) // 2 + pair for pair in pairs)], device=ids.device)
    width = int(inputs["attention_mask"][rows].sum(dim=1).max())
    names = ("input_ids", "attention_mask", "completion_mask")
    return {name: inputs[name].index_select(0, rows)[:, :width] for name in names}


def parts(widths: Sequence[int], extra: int = PART) -> list[list[int]]:
    """Indices of rows (n,) in parts of like width, so that all parts together cost least.

    A part costs its rows times the widest of them, and `extra` tokens more.
    """
    order = sorted(range(len(widths)), key=lambda i: widths[i])
    best, cuts = [0], [0]  # the least cost of the first k rows, and where their last part begins
    for end in range(1, len(order) + 1):
        costs = [best[begin] + (end - begin) * widths[order[end - 1]] + extra for begin in range(end)]
        cuts.append(min(range(end), key=costs.__getitem__))
        best.append(costs[cuts[end]])
    found, end = [], len(order)
    while end:
        found.append(order[cuts[end] : end])
        end = cuts[end]
    return found[::-1]
