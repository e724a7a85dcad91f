"""Sampling from the builder's Llama, with a cache of keys and values."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from selfplay.worlds.tiny.builder.llama import Llama


def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    k: int,
    end: int,
    max_tokens: int,
    seed: int,
    rows: int = 512,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """`k` samples for each rendered prompt, the `end` token included where it was sampled.

    Prompts of one length are sampled together, at most `rows` rows at a time, so nothing is padded.
    """
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(prompts):
        by_length.setdefault(len(row), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    answers: list[list[list[int]]] = [[[] for _ in range(k)] for _ in prompts]
    with torch.inference_mode():
        for length, members in by_length.items():
            for first in range(0, len(members), max(1, rows // k)):
                chunk = members[first : first + max(1, rows // k)]
                cells = [answers[i][j] for i in chunk for j in range(k)]
                caches = model.empty_caches(len(chunk), length + max_tokens)
                hidden = model(torch.tensor([list(prompts[i]) for i in chunk]), caches)[:, -1]
                caches = [[half.repeat_interleave(k, 0) for half in layer] for layer in caches]
                hidden = hidden.repeat_interleave(k, 0)
                for n in range(max_tokens):
                    drawn = torch.multinomial(
                        (F.linear(hidden, model.table) / temperature).softmax(-1), 1, generator=generator
                    )
                    for cell, token in zip(cells, drawn[:, 0].tolist(), strict=True):
                        if not cell or cell[-1] != end:
                            cell.append(token)
                    alive = [i for i, cell in enumerate(cells) if cell[-1] != end]
                    if not alive or n + 1 == max_tokens:
                        break
                    if len(alive) < 0.7 * len(cells):
                        keep = torch.tensor(alive)
                        cells = [cells[i] for i in alive]
                        caches = [[half[keep] for half in layer] for layer in caches]
                        drawn = drawn[keep]
                    hidden = model(drawn, caches, length + n)[:, 0]
    return answers
